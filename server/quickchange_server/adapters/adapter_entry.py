"""What residency knows of one adapter version. Data only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from quickchange_server.adapters.packing import AdapterImage


class LoadJob(Enum):
    """What the loader is doing for an adapter."""

    NONE = "none"
    LOAD = "load"  # disk to host image
    WRITE = "write"  # host image to device


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """One adapter version that is on a tier, on its way, pinned or claimed."""

    digest: str
    image: AdapterImage | None = None
    slot: int | None = None  # device pages; their content is there unless job is WRITE
    job: LoadJob = LoadJob.NONE
    demand: Mapping[int, int] | None = None  # pages by size, once an image was built
    nbytes: int = 0  # of the image and of the pages, with `demand`
    pinned: bool = False
    forgotten: bool = False
    prefetch: Literal["device", "host"] | None = None
    used: int = 0  # the clock when a claim last began to use it

    @property
    def resident(self) -> bool:
        return self.slot is not None and self.job is not LoadJob.WRITE

    @property
    def idle(self) -> bool:
        """Nothing is kept of it and nothing is under way."""
        return self.image is None and self.slot is None and self.job is LoadJob.NONE


def slots_of(entries: Iterable[AdapterEntry]) -> list[int]:
    """The slots of those that have one."""
    return [entry.slot for entry in entries if entry.slot is not None]


def total_demand(entries: Iterable[AdapterEntry]) -> Counter[int]:
    """Pages by size of all entries whose size is known."""
    total: Counter[int] = Counter()
    for entry in entries:
        total.update(entry.demand or {})
    return total
