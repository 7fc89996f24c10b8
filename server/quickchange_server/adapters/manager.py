"""Adapter residency: which adapters are on the device, which on the host, and which give way.

Requests claim the adapters that they need. Claims are served in order of arrival: what an older
claim needs is never taken for a younger one, and what a held claim uses is never taken at all.
Where the oldest claim without room can only get it from adapters in use, as many of these as it
takes, the least recently used first, accept no new use until they are free ("draining"): it waits
for requests that run, never for those that keep arriving. Whatever needs no room is not touched by
any of this: a claim whose adapters are resident is ready at once.

Eviction is least recently used, by the time a claim last began to use the adapter. An image leaves
the host in the same order; one that the oldest waiting claim needs stays, even over the budget.
Where both tiers lie in one memory, an image would be a second copy of its pages: it leaves once
they are written, as long as the device has had room for all. From the first eviction on it stays,
since adapters come back, and from an image in a sixth of the time.

All state belongs to the engine's thread. The loader's thread runs two kinds of job, disk to image
and image to device, reads whether any claim is held, and touches nothing else. Knows nothing of
names, tokens or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.turbo_heads.turbo_heads_contract import HeadTables
from quickchange_server.adapters.adapter_entry import (
    AdapterEntry,
    ClaimBook,
    LoadJob,
    demands_of,
    slots_of,
)
from quickchange_server.adapters.adapter_loader import Done, Loader, Pacer
from quickchange_server.adapters.arena_sizes import ArenaSizes
from quickchange_server.adapters.memory_pool import DevicePool, too_large
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.adapters.paced_copies import Pause
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_server.adapters.prompts.held_prompt import HeldPrompt, PromptShape
from quickchange_server.adapters.turbo_packing import TurboShape
from quickchange_server.adapters.turbo_tables import TurboSlot
from quickchange_server.protocol import AdapterFailed, AdapterMoved, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter

# Reads an adapter by digest, calling the pause between pieces of the work.
PacedLoad = Callable[[str, Pause], CanonicalAdapter]

_LOADS_AT_ONCE = 4  # queued on the loader: few, so that the order can still follow the claims


class Residency:
    """Manager of the device tier and the host tier. Every method runs on the engine's thread."""

    served = True  # a step may have adapters

    def __init__(
        self,
        pool: DevicePool,
        load: PacedLoad,
        groups: Sequence[ModuleGroup],
        turbo: TurboShape,
        prompts: PromptShape,
        host_budget_bytes: int,
        on_wake: Callable[[], None],
        *,
        one_memory: bool = False,
    ) -> None:
        """`load` and `on_wake` are called on the loader's thread. one_memory: the device's memory
        is the host's."""
        self._pool = pool
        self._load = load
        self._shapes = page_shapes(groups, pool.dtype)
        self._turbo = turbo
        self._prompts = prompts
        self._host_budget = host_budget_bytes
        self._spares_images = one_memory  # until the first eviction
        self._loader: Loader[AdapterImage | None] = Loader(on_wake)
        self._claims = ClaimBook()
        self._pause = Pacer(lambda: bool(self._claims.held))  # only beside running requests
        self._entries: dict[str, AdapterEntry] = {}
        self._draining: frozenset[str] = frozenset()
        self._events: list[AdapterMoved | AdapterFailed] = []
        self._clock = 0
        self._stale = False  # True if something changed since the last plan

    @property
    def tables(self) -> LowRankTables:
        """Tables that captured graphs read: one object for good."""
        return self._pool.tables

    @property
    def wide_tables(self) -> LowRankTables:
        """Tables for steps with adapters of any width."""
        return self._pool.wide_tables

    def tables_of(self, slots: Collection[int]) -> LowRankTables:
        """Tables for a step with these slots; others than `tables` if one is wide."""
        return self._pool.tables_of(slots)

    @property
    def heads(self) -> HeadTables:
        """Tables of the Turbo heads of all adapters on the device."""
        return self._pool.heads

    @property
    def arena(self) -> ArenaSizes:
        return self._pool.sizes

    @property
    def device_bytes(self) -> int:
        """Budget of the device tier."""
        return self._pool.budget_bytes

    def turbo(self, slot: int) -> TurboSlot | None:
        """The Turbo heads of the adapter in a slot; None if it has none."""
        return self._pool.turbo(slot)

    def head_count(self, slot: int) -> int:
        """Number of tokens that the Turbo heads in a slot draft."""
        turbo = self._pool.turbo(slot)
        return 0 if turbo is None else turbo.depth

    def updates(self, slot: int, group: int) -> bool:
        """True if the adapter in a slot has an update in a module group."""
        return self._pool.updates(slot, group)

    def refusal(self, submit: Submit) -> str | None:
        """None: every adapter may be asked for."""

    @property
    def in_flight(self) -> int:
        """Number of adapters that the loader reads or copies, or will."""
        return sum(entry.job is not LoadJob.NONE for entry in self._entries.values())

    @property
    def known(self) -> int:
        """Number of adapters on a tier, on their way, pinned or claimed."""
        return len(self._entries)

    @property
    def host_images(self) -> dict[str, int]:
        """Bytes on the host of each adapter that has any there, by digest."""
        return {e.digest: e.host_bytes for e in self._entries.values() if e.host_bytes}

    # --- claims ---------------------------------------------------------------------------------

    def claim(self, key: str, digests: Sequence[str]) -> None:
        """Ask for adapters on behalf of request `key`, all or nothing.

        Raises ValueError if the key has a claim already.
        """
        self._claims.add(key, digests)
        for digest in digests:
            self._entry(digest).forgotten = False
        self._stale = True

    def ready(self, key: str) -> dict[str, int] | None:
        """Slots by digest once all are on the device; from then on they are held for `key`."""
        held = self._claims.held.get(key)
        if held is not None:
            return held
        digests = self._claims.waiting.get(key)
        if digests is None or not self._draining.isdisjoint(digests):
            return None
        slots: dict[str, int] = {}
        for digest in digests:
            entry = self._entries[digest]
            if entry.slot is None or not entry.resident:
                return None
            slots[digest] = entry.slot
        self._clock += 1
        for digest in digests:
            self._entries[digest].used = self._clock
        self._claims.hold(key, slots)
        # Another claim may be the oldest now.
        self._stale = self._stale or bool(self._claims.waiting)
        return slots

    def prompt(self, digest: str) -> HeldPrompt | None:
        """The virtual tokens of an adapter on the device; None if it has none."""
        return self._entries[digest].prompt

    def failed(self, key: str) -> str | None:
        """Error of a claim that can't be met, or None. A later claim on its adapters retries."""
        return self._claims.failed.get(key)

    def release(self, key: str) -> None:
        """Drop a claim: its request has ended or no longer needs it. Unknown keys are ignored."""
        self._claims.release(key)
        self._stale = True

    # --- administration -------------------------------------------------------------------------

    def prefetch(self, digest: str, tier: Literal["device", "host"]) -> None:
        """Bring an adapter to `tier`, if it fits without disturbing any claim."""
        self._entry(digest).prefetch = tier
        self._stale = True

    def pin(self, digest: str, pinned: bool) -> None:
        """Bring an adapter to the device and keep it there; False: let it go again.

        More pins than the device's budget holds are refused with an AdapterFailed event.
        """
        self._entry(digest).pin(pinned)
        self._stale = True

    def forget(self, digest: str) -> None:
        """Drop an adapter and its pin as soon as no claim needs it."""
        self._entry(digest).forget()
        self._stale = True

    # --- work -----------------------------------------------------------------------------------

    def poll(self) -> list[AdapterMoved | AdapterFailed]:
        """Apply finished loads, evict, start the next loads; events since the last call."""
        for done in self._loader.finished():
            self._finish(done)
            self._stale = True
        while self._stale:
            self._stale = False
            self._plan()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """End the loader's thread, after its running job."""
        self._loader.close()

    def check_integrity(self) -> None:
        """Raises AssertionError if claims, entries and the pool disagree."""
        self._pool.check_integrity()
        self._claims.check_integrity(self._entries)
        slots = slots_of(self._entries.values())
        assert len(slots) == len(set(slots)), "a slot belongs to two adapters"
        assert sorted(slots) == self._pool.slots, "a slot belongs to no adapter"
        for entry in self._entries.values():
            assert entry.job is not LoadJob.WRITE or entry.slot is not None, "a write to nowhere"
            assert entry.slot is None or entry.demand is not None, "pages of unknown size"

    def _entry(self, digest: str) -> AdapterEntry:
        return self._entries.setdefault(digest, AdapterEntry(digest))

    def _plan(self) -> None:
        """Serve all wants in one pass: claims, the oldest first, then pins and prefetches."""
        self._draining = frozenset()
        pinned = [e for e in self._entries.values() if e.pinned]
        older: set[str] = set()  # needed by the claims seen so far
        blocked = False  # the rest of the claims may take no room
        loading = True  # the rest of the claims may start loads
        for key, digests in list(self._claims.waiting.items()):
            if any(self._entries[digest].slot is None for digest in digests):
                loading = loading and self._start_loads(digests, first=not older)
                if self._refuse_impossible(key, pinned):
                    continue
                blocked = blocked or not self._make_resident(digests, older)
            older.update(digests)
        claimed = older | self._claims.in_use
        for entry in list(self._entries.values()):
            self._serve_administration(entry, claimed, blocked)
            if entry.idle and not (entry.pinned or entry.prefetch or entry.digest in claimed):
                del self._entries[entry.digest]
        self._trim_host()

    def _make_resident(self, digests: Sequence[str], older: set[str]) -> bool:
        """Give pages to a claim's adapters that have images. False if there is no room yet."""
        missing = [e for d in digests if (e := self._entries[d]).slot is None]
        if not any(entry.image for entry in missing):
            return True
        victims = self._victims(missing, digests, older)
        if victims is None:
            return False
        busy = self._claims.in_use.intersection(v.digest for v in victims)
        if busy:
            self._draining = frozenset(busy)
            return False
        for victim in victims:
            self._evict(victim)
        for digest in digests:
            self._place(self._entries[digest])
        return True

    def _victims(
        self, missing: list[AdapterEntry], own: Sequence[str], older: set[str]
    ) -> list[AdapterEntry] | None:
        """Entries to evict for the `missing` adapters of one claim: the fewest, in eviction order.

        own: all digests of the claim. older: digests of older claims. None if only older claims
        stand in the way.
        """
        movable = [
            entry
            for entry in self._entries.values()
            if entry.resident and not entry.pinned and entry.digest not in older
        ]
        demands = demands_of(missing)
        kept = set(slots_of(self._entries.values()))
        victims: list[AdapterEntry] = []
        for entry in self._claims.eviction_order(movable, own):
            if self._pool.fits(demands, kept):
                break
            victims.append(entry)
            kept.difference_update(slots_of([entry]))
            if entry.digest in own:
                demands += demands_of([entry])
        return victims if self._pool.fits(demands, kept) else None

    def _place(self, entry: AdapterEntry) -> None:
        """Start the copy of an image to the device, if there is an image and room."""
        if entry.image is None or entry.slot is not None:
            return
        slot = self._pool.allocate(entry.image)
        if slot is not None:
            image = entry.image
            entry.slot, entry.job = slot, LoadJob.WRITE
            self._loader.submit(entry.digest, lambda: self._pool.write(slot, image, self._pause))

    def _start_loads(self, digests: Iterable[str], *, first: bool) -> bool:
        """Start to read the missing images. False if no more may be started for now.

        The oldest claim (`first`) must always get on: the host's budget does not hold it up.
        """
        for digest in digests:
            entry = self._entries[digest]
            if entry.image is not None or entry.slot is not None or entry.job is not LoadJob.NONE:
                continue
            loading = [e for e in self._entries.values() if e.job is LoadJob.LOAD]
            # An adapter that was never loaded is taken to be as large as the largest known one.
            largest = max((e.loaded_bytes for e in self._entries.values()), default=0)
            ahead = [*self._awaited_images(), *loading, entry]
            promised = sum(e.loaded_bytes or largest for e in ahead)
            full = promised > self._host_budget and not first
            if full or len(loading) >= _LOADS_AT_ONCE:
                return False
            entry.job = LoadJob.LOAD
            self._loader.submit(digest, self._load_job(digest))
        return True

    def _load_job(self, digest: str) -> Callable[[], AdapterImage]:
        pin_memory = self._pool.device.type == "cuda"

        def job() -> AdapterImage:
            adapter = self._load(digest, self._pause)
            if adapter.turbo is not None:
                self._turbo.check(adapter.turbo)
            image = build_image(
                adapter, self._shapes, self._pool.dtype, pin_memory=pin_memory, pause=self._pause
            )
            prompt = None
            if adapter.prompt is not None:
                prompt = self._prompts.held(adapter.prompt, self._pause)
            return replace(image, digest=digest, prompt=prompt)

        return job

    def _finish(self, done: Done[AdapterImage | None]) -> None:
        entry = self._entries[done.tag]
        job, entry.job = entry.job, LoadJob.NONE
        if done.error is not None:
            self._fail(entry, str(done.error) or repr(done.error))
        elif job is LoadJob.LOAD and done.result is not None:
            self._clock += 1
            entry.keep_image(done.result, self._clock)
            self._moved(entry, "load", done.seconds)
        elif entry.slot is not None:
            self._pool.publish(entry.slot)
            if self._spares_images:
                entry.leave_host()
            self._moved(entry, "load", done.seconds)

    def _fail(self, entry: AdapterEntry, error: str) -> None:
        """Give up an adapter that can't be loaded, with its pin and the claims that wait for it."""
        if entry.slot is not None:
            self._pool.free(entry.slot)
            entry.leave_device()
        entry.pinned, entry.prefetch = False, None
        self._claims.fail_all(entry.digest, error)
        self._events.append(AdapterFailed(entry.digest, error))

    def _refuse_impossible(self, key: str, pinned: Sequence[AdapterEntry]) -> bool:
        """Fail a claim that can't fit beside the pinned adapters with all else gone."""
        resident = [entry for entry in pinned if entry.slot is not None]
        wanted = [e for d in self._claims.waiting[key] if (e := self._entries[d]) not in resident]
        if self._pool.fits(demands_of(wanted), slots_of(resident)):
            return False
        needed = sum(entry.nbytes for entry in wanted)
        error = f"the request's adapters: {too_large(needed, self._pool.budget_bytes)}"
        if resident:
            error += f", or unpin some ({sum(e.nbytes for e in resident)} bytes are pinned)"
        self._claims.fail(key, error)
        return True

    def _serve_administration(self, entry: AdapterEntry, claimed: set[str], blocked: bool) -> None:
        """Carry out an adapter's pin, prefetch or removal as far as it disturbs no claim."""
        if entry.forgotten:
            if entry.job is LoadJob.NONE and entry.digest not in claimed:
                self._drop(entry)
        elif entry.pinned and entry.slot is None:
            self._start_loads([entry.digest], first=not self._claims.waiting)
            if entry.image is not None and self._pin_fits(entry) and not blocked:
                self._place_quietly(entry, claimed)
        elif entry.prefetch is not None:
            self._start_loads([entry.digest], first=not self._claims.waiting)
            if entry.prefetch == "device" and entry.image is not None and not blocked:
                self._place_quietly(entry, claimed)
            if entry.image is not None or entry.slot is not None:
                entry.prefetch = None

    def _place_quietly(self, entry: AdapterEntry, claimed: set[str]) -> None:
        """Bring an entry to the device, in the place of adapters that no claim needs at most."""
        if entry.slot is None:
            victims = self._victims([entry], (), claimed)
            if victims is not None:
                for victim in victims:
                    self._evict(victim)
                self._place(entry)

    def _pin_fits(self, entry: AdapterEntry) -> bool:
        """True if all pins fit together; else this one is refused."""
        pinned = [e for e in self._entries.values() if e.pinned]
        if self._pool.fits(demands_of(pinned), ()):
            return True
        entry.pinned = False
        reason = too_large(sum(e.nbytes for e in pinned), self._pool.budget_bytes)
        error = f"it can't be pinned: with those pinned already it {reason}, or unpin others"
        self._events.append(AdapterFailed(entry.digest, error))
        return False

    def _drop(self, entry: AdapterEntry) -> None:
        """Drop an entry from both tiers."""
        if not entry.idle:
            if entry.slot is not None:
                self._pool.free(entry.slot)
            entry.leave_device()
            entry.leave_host()
            self._moved(entry, "forget")

    def _evict(self, entry: AdapterEntry) -> None:
        """Evict an entry from the device; the host's copy stays, if there is one."""
        if entry.slot is not None:
            self._spares_images = False
            self._pool.free(entry.slot)
            entry.leave_device()
            self._moved(entry, "evict")
            self._stale = True  # a claim may need it

    def _awaited_images(self) -> list[AdapterEntry]:
        """Entries whose image some waiting claim needs, those of the oldest claim first."""
        awaited = [self._entries[digest] for digest in self._claims.awaited]
        return [entry for entry in awaited if entry.image is not None and not entry.resident]

    def _trim_host(self) -> None:
        """Bring the host tier to its budget. Adapters leave the device too, where nobody uses them
        and virtual tokens would stay on the host for them."""
        total = sum(self.host_images.values())
        if total <= self._host_budget:
            return
        awaited, oldest = self._awaited_images(), self._claims.oldest
        needed = self._claims.in_use.union(self._claims.awaited)
        free = [e for e in self._entries.values() if e.host_bytes and e not in awaited]
        free.sort(key=lambda entry: entry.used)
        for entry in [*free, *(e for e in reversed(awaited) if e.digest not in oldest)]:
            if total <= self._host_budget:
                return
            if entry.job is not LoadJob.NONE:
                continue
            total -= entry.host_bytes
            entry.leave_host()
            if entry.slot is None:
                self._moved(entry, "evict")
            elif entry.prompt is not None and not (entry.pinned or entry.digest in needed):
                self._evict(entry)
            total += entry.host_bytes

    def _moved(
        self, entry: AdapterEntry, reason: Literal["load", "evict", "forget"], seconds: float = 0.0
    ) -> None:
        """Note that an entry has come to its present tier."""
        tier = entry.tier
        size = {"disk": 0, "host": entry.host_bytes, "device": entry.nbytes}[tier]
        self._events.append(
            AdapterMoved(entry.digest, tier, reason, seconds, size, entry.pinned, entry.rank)
        )


class NoAdapters:
    """Null object for a server without adapters: the tiers are empty, nothing may be claimed."""

    served = False
    arena = None
    device_bytes = 0

    @property
    def tables(self) -> LowRankTables:
        raise _not_served("tables")

    @property
    def wide_tables(self) -> LowRankTables:
        raise _not_served("tables")

    def tables_of(self, slots: Collection[int]) -> LowRankTables:
        raise _not_served(f"slots {slots}")

    @property
    def heads(self) -> HeadTables:
        raise _not_served("heads")

    def turbo(self, slot: int) -> TurboSlot | None:
        raise _not_served(f"slot {slot}")

    def head_count(self, slot: int) -> int:
        raise _not_served(f"slot {slot}")

    def updates(self, slot: int, group: int) -> bool:
        raise _not_served(f"slot {slot}, group {group}")

    def refusal(self, submit: Submit) -> str | None:
        if submit.adapters or (submit.drafting is not None and submit.drafting.heads is not None):
            return "adapters: switched off on this server by the setting 'adapters'"
        return None

    def claim(self, key: str, digests: Sequence[str]) -> None:
        raise _not_served(f"{key} claims {digests}")

    def ready(self, key: str) -> dict[str, int] | None:
        raise _not_served(f"claim {key}")

    def prompt(self, digest: str) -> HeldPrompt | None:
        raise _not_served(f"the virtual tokens of {digest}")

    def failed(self, key: str) -> str | None:
        raise _not_served(f"claim {key}")

    def release(self, key: str) -> None:
        raise _not_served(f"claim {key}")

    def prefetch(self, digest: str, tier: Literal["device", "host"]) -> None:
        """Do nothing: it is a hint."""

    def pin(self, digest: str, pinned: bool) -> None:
        """Do nothing: nothing is evicted."""

    def forget(self, digest: str) -> None:
        """Do nothing: nothing is kept."""

    def poll(self) -> list[AdapterMoved | AdapterFailed]:
        return []

    def close(self) -> None:
        """Do nothing: there is no thread to end."""

    def check_integrity(self) -> None:
        """Do nothing: nothing can be broken."""


AdapterTiers = Residency | NoAdapters


def _not_served(asked: str) -> RuntimeError:
    return RuntimeError(f"{asked}: asked of an engine without adapters")
