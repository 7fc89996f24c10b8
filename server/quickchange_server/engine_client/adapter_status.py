"""The tier of each adapter version, as the engine's events reported it.

Digests, tiers and bytes only: names on disk and budgets are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quickchange_server.protocol import AdapterMoved, Tier


@dataclass(frozen=True, slots=True)
class Residence:
    """The tier that holds an adapter version, and the bytes it occupies there."""

    tier: Tier
    bytes: int
    pinned: bool
    rank: int = 0  # the highest of the version's updates


class AdapterStatus(Mapping[str, Residence]):
    """The adapter versions on the device or host tier, by digest; any other version is on disk.

    Pins are kept here too, also those of versions on disk, because each new engine needs them
    sent again.
    """

    def __init__(self) -> None:
        self._residences: dict[str, Residence] = {}
        self._pins: dict[str, None] = {}  # an ordered set: oldest pin first
        self._labels: dict[str, str] = {}

    def __getitem__(self, digest: str) -> Residence:
        return self._held()[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    @property
    def pins(self) -> tuple[str, ...]:
        return tuple(self._pins)

    def snapshot(self) -> dict[str, Residence]:
        """A copy, for readers on other threads."""
        return dict(self._held())

    def label(self, digest: str) -> str | None:
        """The adapter name under which the version was last requested."""
        return self._labels.get(digest)

    def name(self, digest: str, label: str) -> None:
        """Remember the adapter name under which a version was requested."""
        self._labels[digest] = label

    def pin(self, digest: str, pinned: bool) -> None:
        if pinned:
            self._pins[digest] = None
        else:
            self._pins.pop(digest, None)
        if digest in self._residences:
            self._residences[digest] = replace(self._residences[digest], pinned=pinned)

    def forget(self, digest: str) -> None:
        """Drop the pin and the name of a version that is no longer served."""
        self.pin(digest, False)
        self._labels.pop(digest, None)

    def moved(self, event: AdapterMoved) -> Tier | None:
        """Apply an engine event. Returns the version's tier before it, or None if unknown."""
        before = self._residences.pop(event.digest, None)
        if event.tier != "disk":
            pinned = event.digest in self._pins
            self._residences[event.digest] = Residence(event.tier, event.bytes, pinned, event.rank)
        return None if before is None else before.tier

    def clear(self) -> None:
        """Empty both tiers, since the engine is gone. Pins stay."""
        self._residences.clear()

    def _held(self) -> Mapping[str, Residence]:
        """What is read; `_residences`, but for a subclass that gets it from elsewhere."""
        return self._residences
