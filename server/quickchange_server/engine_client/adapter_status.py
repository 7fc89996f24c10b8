"""Where the engine holds each adapter version, as the API process has been told.

Knows nothing of names on disk or of budgets: digests, tiers and bytes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quickchange_server.protocol import AdapterMoved, Tier


@dataclass(frozen=True, slots=True)
class Residence:
    """Where an adapter version is, and what it occupies there."""

    tier: Tier
    bytes: int
    pinned: bool


class Residences(Mapping[str, Residence]):
    """By digest, the adapter versions on the device or host tier; what is missing is on disk.

    Pins belong to the API process, which sends them again to each new engine, so they are kept
    here too, of versions on disk included.
    """

    def __init__(self) -> None:
        self._residences: dict[str, Residence] = {}
        self._pins: dict[str, None] = {}  # in the order in which they were asked for
        self._labels: dict[str, str] = {}

    def __getitem__(self, digest: str) -> Residence:
        return self._residences[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._residences)

    def __len__(self) -> int:
        return len(self._residences)

    @property
    def pins(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def snapshot(self) -> dict[str, Residence]:
        """A copy, for readers on other threads."""
        return dict(self._residences)

    def label(self, digest: str) -> str | None:
        """The name under which the version was last asked for."""
        return self._labels.get(digest)

    def name(self, digest: str, label: str) -> None:
        """Remember the name under which a version is asked for."""
        self._labels[digest] = label

    def pin(self, digest: str, pinned: bool) -> None:
        if pinned:
            self._pins[digest] = None
        else:
            self._pins.pop(digest, None)
        if digest in self._residences:
            self._residences[digest] = replace(self._residences[digest], pinned=pinned)

    def forget(self, digest: str) -> None:
        """A version is no longer served: no pin and no name of it is kept."""
        self.pin(digest, False)
        self._labels.pop(digest, None)

    def moved(self, event: AdapterMoved) -> Tier | None:
        """Take an event of the engine. Returns the tier where the version was, None if unknown."""
        before = self._residences.pop(event.digest, None)
        if event.tier != "disk":
            pinned = event.digest in self._pins
            self._residences[event.digest] = Residence(event.tier, event.bytes, pinned)
        return None if before is None else before.tier

    def clear(self) -> None:
        """The engine is gone, and with it both tiers. Pins stay."""
        self._residences.clear()
