"""State of adapter residency: adapter versions on the tiers, and the claims of requests on them.

Data with the transitions that need no pool and no loader. Knows nothing of room or of copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from quickchange_server.adapters.packing import AdapterImage
from quickchange_server.adapters.prompts.held_prompt import HeldPrompt
from quickchange_server.protocol import Tier


class LoadJob(Enum):
    """The loader's job for an adapter."""

    NONE = "none"
    LOAD = "load"  # disk to host image
    WRITE = "write"  # host image to device


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """One adapter version that is on a tier, on its way, pinned or claimed."""

    digest: str
    image: AdapterImage | None = None
    prompt: HeldPrompt | None = None  # kept as long as the image or the slot is
    slot: int | None = None  # device pages; their content is there unless job is WRITE
    job: LoadJob = LoadJob.NONE
    demand: Mapping[int, int] | None = None  # pages by size, once an image was built
    nbytes: int = 0  # size of the image and of the pages, known with `demand`
    loaded_bytes: int = 0  # of the image and virtual tokens, known with `demand`
    rank: int = 0  # known with `demand`
    pinned: bool = False
    forgotten: bool = False
    prefetch: Literal["device", "host"] | None = None
    used: int = 0  # the clock when a claim last began to use it

    @property
    def resident(self) -> bool:
        """True if its pages are on the device."""
        return self.slot is not None and self.job is not LoadJob.WRITE

    @property
    def idle(self) -> bool:
        """True if nothing is kept of it and nothing is under way."""
        return self.image is None and self.slot is None and self.job is LoadJob.NONE

    @property
    def tier(self) -> Tier:
        """The fastest tier that holds it or will, once a write is done."""
        if self.slot is not None:
            return "device"
        return "disk" if self.image is None else "host"

    def keep_image(self, image: AdapterImage, clock: int) -> None:
        """Keep the host image that was loaded."""
        self.image, self.demand, self.nbytes = image, image.demand, image.nbytes
        self.prompt = image.prompt
        self.loaded_bytes = self.host_bytes
        self.rank, self.used = image.rank, clock

    @property
    def host_bytes(self) -> int:
        """Bytes on the host: of the image, and of virtual tokens."""
        image = 0 if self.image is None else self.image.nbytes
        return image + (0 if self.prompt is None else self.prompt.nbytes)

    def leave_host(self) -> None:
        """Drop the image; virtual tokens stay while a slot needs them."""
        self.image = None
        if self.slot is None:
            self.prompt = None

    def leave_device(self) -> None:
        """Drop the slot, which its owner has freed."""
        self.slot = None
        if self.image is None:
            self.prompt = None

    def pin(self, pinned: bool) -> None:
        """Pin or unpin; a pin revokes `forget`."""
        self.pinned = pinned
        self.forgotten = self.forgotten and not pinned

    def forget(self) -> None:
        """Note that it is to be dropped."""
        self.forgotten, self.pinned, self.prefetch = True, False, None


class ClaimBook:
    """Requests' claims, by key: waiting in order of arrival, held or failed."""

    def __init__(self) -> None:
        self.waiting: dict[str, tuple[str, ...]] = {}  # digests
        self.held: dict[str, dict[str, int]] = {}  # device slots by digest
        self.failed: dict[str, str] = {}  # errors

    @property
    def oldest(self) -> tuple[str, ...]:
        """Digests of the claim that has waited longest; empty if none waits."""
        return next(iter(self.waiting.values()), ())

    @property
    def in_use(self) -> set[str]:
        """Digests that some held claim uses."""
        return {digest for slots in self.held.values() for digest in slots}

    @property
    def awaited(self) -> list[str]:
        """Digests that some waiting claim needs, those of the oldest claim first."""
        return list(dict.fromkeys(d for digests in self.waiting.values() for d in digests))

    def add(self, key: str, digests: Sequence[str]) -> None:
        """Let a new claim wait. Raises ValueError if the key has one already."""
        if key in self.waiting or key in self.held or key in self.failed:
            raise ValueError(f"claim {key!r} exists already: release it first")
        self.waiting[key] = tuple(dict.fromkeys(digests))

    def hold(self, key: str, slots: dict[str, int]) -> None:
        """Meet a waiting claim."""
        del self.waiting[key]
        self.held[key] = slots

    def fail(self, key: str, error: str) -> None:
        """Refuse a waiting claim."""
        del self.waiting[key]
        self.failed[key] = error

    def fail_all(self, digest: str, error: str) -> None:
        """Refuse every waiting claim on an adapter."""
        for key in [k for k, digests in self.waiting.items() if digest in digests]:
            self.fail(key, error)

    def release(self, key: str) -> None:
        """Drop a claim in any state; an unknown key is ignored."""
        self.waiting.pop(key, None)
        self.held.pop(key, None)
        self.failed.pop(key, None)

    def eviction_order(
        self, entries: Iterable[AdapterEntry], own: Collection[str]
    ) -> list[AdapterEntry]:
        """The order in which entries give way to a claim on the digests `own`.

        First what no waiting claim needs, then what younger claims do (the youngest's first), then
        what is in use, and last the claim's own others, which are then needed anew: their pages
        may be what keeps slabs from becoming empty. Of equals, the least recently used.
        """
        turn = {d: i for i, ds in enumerate(reversed(self.waiting.values()), 1) for d in ds}
        in_use = self.in_use

        def order(entry: AdapterEntry) -> tuple[bool, bool, int, int]:
            # Adapters in use go by use alone: claims come all the time, and whoever is to give way
            # must stay the same until it does.
            busy = entry.digest in in_use
            age = 0 if busy else turn.get(entry.digest, 0)
            return entry.digest in own, busy, age, entry.used

        return sorted(entries, key=order)

    def check_integrity(self, entries: Mapping[str, AdapterEntry]) -> None:
        """Raises AssertionError if a claim is in two states or disagrees with `entries`."""
        keys = [*self.waiting, *self.held, *self.failed]
        assert len(keys) == len(set(keys)), "a claim in two states"
        for slots in self.held.values():
            for digest, slot in slots.items():
                assert entries[digest].resident, "a held adapter is not on the device"
                assert entries[digest].slot == slot, "a held adapter moved"
        assert set(self.awaited) <= set(entries), "a claimed adapter has no entry"


def slots_of(entries: Iterable[AdapterEntry]) -> list[int]:
    """Slots of the entries that have one."""
    return [entry.slot for entry in entries if entry.slot is not None]


def demands_of(entries: Iterable[AdapterEntry]) -> list[Mapping[int, int]]:
    """Pages by size of each entry; none where the size is not known."""
    return [entry.demand or {} for entry in entries]
