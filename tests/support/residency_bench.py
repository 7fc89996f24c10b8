"""A residency whose loader the test lets through, over adapters whose names say their size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_server.adapters.manager import Residency
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.paced_copies import Pause
from quickchange_server.adapters.prompts.held_prompt import CacheShape, PromptShape
from quickchange_server.adapters.turbo_packing import TurboShape
from quickchange_server.protocol import AdapterFailed, AdapterMoved
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

GROUPS = (
    ModuleGroup(0, "linear", 8, 8, (Member("small", 0, 8),)),
    ModuleGroup(1, "linear", 32, 32, (Member("large", 0, 32),)),
)
SMALL, LARGE = 512, 2048  # bytes of one page
HIDDEN, VOCABULARY = 16, 101  # of the model that heads draft for
HEAD = 4 * 16 * (HIDDEN + 1)  # bytes of a head of one block: one page
SLABS, SLAB = 16, 2048  # what a budget of 32 KiB is divided into
WAIT = 20.0  # seconds until a test that hangs fails


def make_adapter(kind: str, count: int) -> CanonicalAdapter:
    """An adapter of a kind that `Store` below names, with its content by `count`."""
    if kind in "tx":
        return turbo_adapter(make_turbo(HIDDEN + (kind == "x"), count))
    if kind == "b":
        return turbo_adapter(make_turbo(HIDDEN, count), large=ones(8, 32))
    if kind == "s":
        return CanonicalAdapter("Tiny", "tiny", {"small": ones(8 * count, 8)})
    return CanonicalAdapter("Tiny", "tiny", {"large": ones(8 * count, 32)})


def ones(rank: int, features: int) -> LowRankUpdate:
    return LowRankUpdate(torch.ones(rank, features), torch.ones(features, rank), 1.0)


class Store:
    """Adapters by name. Loads wait at a gate.

    "sN..." has N small pages, "lN..." N large ones, "tN..." N Turbo heads, "bN..." N heads and a
    large page, "xN..." N heads for another base model.
    """

    def __init__(self) -> None:
        self.gate = threading.Semaphore(2000)
        self.broken: set[str] = set()
        self.loads: list[str] = []

    def load(self, digest: str, _pause: Pause) -> CanonicalAdapter:
        assert self.gate.acquire(timeout=WAIT)
        self.loads.append(digest)
        if digest in self.broken:
            raise OSError(f"{digest}: no such file")
        return make_adapter(digest[0], int(digest[1]))

    def close_gate(self) -> None:
        while self.gate.acquire(blocking=False):
            pass


class Bench:
    """A residency, its store, and what happened."""

    def __init__(
        self, slabs: int = SLABS, host: int = 1 << 20, *, one_memory: bool = False
    ) -> None:
        self.store = Store()
        self.awake = threading.Semaphore(0)
        self.events: list[AdapterMoved | AdapterFailed] = []
        self.pool = DevicePool(GROUPS, slabs * SLAB, torch.float32, torch.device("cpu"))
        self.residency = Residency(
            self.pool,
            self.store.load,
            GROUPS,
            TurboShape(HIDDEN, VOCABULARY),
            PromptShape(HIDDEN, CacheShape(2, 1, 4), 1 << 20, torch.float32),
            host,
            self.awake.release,
            one_memory=one_memory,
        )

    def poll(self) -> None:
        self.events += self.residency.poll()
        self.residency.check_integrity()

    def step(self) -> None:
        """Let the loader end one job, and apply it."""
        self.poll()
        if self.residency.in_flight:
            assert self.awake.acquire(timeout=WAIT)
            self.poll()

    def settle(self) -> None:
        self.poll()
        while self.residency.in_flight:
            self.step()

    def hold(self, key: str, *digests: str) -> dict[str, int]:
        """Claim, and wait until it is held."""
        self.residency.claim(key, digests)
        self.settle()
        slots = self.residency.ready(key)
        assert slots is not None, self.residency.failed(key)
        return slots

    def use(self, *digests: str) -> None:
        """Hold and release."""
        self.hold("use", *digests)
        self.residency.release("use")

    def tier(self, digest: str) -> str:
        """By the events told."""
        moved = [e.tier for e in self.events if isinstance(e, AdapterMoved) and e.digest == digest]
        return moved[-1] if moved else "disk"


@contextmanager
def bench(slabs: int = SLABS, host: int = 1 << 20, *, one_memory: bool = False) -> Iterator[Bench]:
    made = Bench(slabs, host, one_memory=one_memory)
    try:
        yield made
        made.poll()
    finally:
        made.store.gate.release(1000)
        made.residency.close()
