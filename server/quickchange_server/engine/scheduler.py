"""What the next step computes: which sequences, how many tokens of each.

Continuous batching with chunked prefill: every running sequence gets its next rows, decode rows
first of all (they are one each), the rest of the row budget goes to prefill chunks in order of
admission. When KV blocks run out, the sequence admitted last gives its blocks back and is computed
anew later (preemption by recompute; what the prefix cache still holds is found again). What is left
of rows and free blocks may go to drafts of sequences that decode. Knows nothing of tensors or text.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from quickchange_server.engine.admission import FairQueue
from quickchange_server.engine.kv_cache import KVBlocks
from quickchange_server.engine.sequence import Sequence
from quickchange_server.messages import FinishReason


class Claims(Protocol):
    """What the scheduler needs of adapter residency: hold a request's adapters on the device."""

    def claim(self, key: str, digests: list[str]) -> None: ...
    def ready(self, key: str) -> Mapping[str, int] | None: ...
    def failed(self, key: str) -> str | None: ...
    def release(self, key: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Rows of one sequence in the coming step: tokens [computed, computed + count), then drafts."""

    sequence: Sequence
    count: int
    components: tuple[tuple[int, float], ...]  # (device slot, weight) of each adapter
    heads: int | None = None  # device slot of its Turbo heads
    drafts: tuple[int, ...] = ()  # tokens to verify, each one after the one before

    @property
    def samples(self) -> bool:
        """Whether the last of the sequence's tokens is among these rows: it yields a new one."""
        return self.count == self.sequence.remaining

    @property
    def rows(self) -> int:
        return self.count + len(self.drafts)

    @property
    def sampled_rows(self) -> int:
        """How many of the rows, the last ones, yield a token."""
        return 1 + len(self.drafts) if self.samples else 0


class Drafts(Protocol):
    """What the scheduler needs of speculation: which drafts are worth their rows."""

    def buy(self, plan: Seq[Scheduled], room: int) -> Seq[tuple[int, ...]]:
        """The tokens to verify for each item, empty for most; at most `room` in all."""
        ...


class Scheduler:
    """Owner of all sequences in the engine and of their KV blocks."""

    def __init__(
        self,
        blocks: KVBlocks,
        claims: Claims | None,
        drafts: Drafts | None = None,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
    ) -> None:
        if max_batch_tokens <= max_sequences:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) must exceed max_sequences "
                f"({max_sequences}): every running sequence needs a row and prefill needs some more"
            )
        if blocks.num_blocks * blocks.block_size < max_model_len:
            raise ValueError(
                f"kv_cache_bytes holds {blocks.num_blocks * blocks.block_size} tokens, fewer than "
                f"max_model_len ({max_model_len}): raise the one or lower the other"
            )
        self.blocks = blocks
        self._claims = claims  # None: no sequence with adapters may be added
        self._drafts = drafts  # None: nothing is drafted
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.waiting = FairQueue()
        self.preempted: list[Sequence] = []  # in order of arrival; before all waiting
        self.running: list[Sequence] = []  # in order of admission
        self._sequences: dict[str, Sequence] = {}
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        if digests := sequence.digests():
            self._holder().claim(sequence.request_id, digests)
        self._sequences[sequence.request_id] = sequence
        self.waiting.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a sequence wherever it is; an unknown id is one that has already ended."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._end(sequence)

    def failures(self) -> list[tuple[Sequence, str]]:
        """Remove and return the waiting whose adapters can't be loaded, each with the error."""
        failed = [
            (sequence, error)
            for sequence in self.waiting
            if sequence.digests() and (error := self._holder().failed(sequence.request_id))
        ]
        for sequence, _ in failed:
            self.cancel(sequence.request_id)
        return failed

    def schedule(self, now: float) -> list[Scheduled]:
        """The coming step. `now` in seconds, on the clock of the sequences' arrival."""
        plan: list[Scheduled] = []
        decoding = sum(sequence.remaining == 1 for sequence in self.running)
        prefill_budget = self.max_batch_tokens - decoding
        preemptions = self.preemptions
        for sequence in list(self.running):
            if sequence not in self.running:
                break  # preempted for one before it, as are all after it
            decode = sequence.remaining == 1
            count = 1 if decode else min(sequence.remaining, prefill_budget)
            if count and self._grow(sequence, count):
                plan.append(self._scheduled(sequence, count))
                prefill_budget -= 0 if decode else count
        if self.preemptions == preemptions:
            plan += self._admit(prefill_budget, now)
        # Rows under the same adapters side by side: one segment, whose weights are read once.
        plan.sort(key=lambda item: item.components)
        return plan if self._drafts is None else self._with_drafts(plan, self._drafts)

    def advance(self, item: Scheduled, tokens: Seq[int]) -> tuple[int, FinishReason | None]:
        """Record that `item` was computed and which tokens it gave: none where it does not sample,
        else one more than drafts that held.

        Returns how many of them count (the first that ends the sequence is the last of it), and
        whether the sequence ended.
        """
        sequence = item.sequence
        sequence.computed += item.count
        taken, reason = 0, None
        for token in tokens:
            sequence.take(token)
            taken += 1
            reason = sequence.finish_reason(self.max_model_len)
            if reason is not None:
                break
        sequence.computed += max(taken - 1, 0)  # the rows of drafts that held
        self._commit_full_blocks(sequence)
        if reason is not None:
            self.finish(sequence)
        return taken, reason

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._end(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError if a sequence or a block is lost, shared or counted twice."""
        self.blocks.check_integrity()
        everywhere = [*self.running, *self.preempted, *self.waiting]
        assert {s.request_id for s in everywhere} == set(self._sequences), "a sequence is lost"
        assert len(everywhere) == len(self._sequences), "a sequence in two places"
        assert len(self.running) <= self.max_sequences, "too many running"
        held = {block for s in self.running for block in s.blocks}
        assert len(held) == self.blocks.used, "a used block belongs to no running sequence"
        for sequence in self.running:
            room = len(sequence.blocks) * self.blocks.block_size
            assert sequence.computed <= room, "more tokens computed than blocks hold"
            assert sequence.remaining >= 1, "nothing left to compute in a running sequence"
        for sequence in [*self.preempted, *self.waiting]:
            assert not sequence.blocks, "a sequence that isn't running holds blocks"
            assert not sequence.computed, "a sequence that isn't running counts as computed"

    def _with_drafts(self, plan: list[Scheduled], drafts: Drafts) -> list[Scheduled]:
        room = self.max_batch_tokens - sum([item.count for item in plan])
        bought = drafts.buy(plan, room)
        return [
            replace(item, drafts=tokens[: self._room_for_drafts(item, len(tokens))])
            if tokens
            else item
            for item, tokens in zip(plan, bought, strict=True)
        ]

    def _room_for_drafts(self, item: Scheduled, count: int) -> int:
        """How many drafts find a place: nobody gives way for them."""
        sequence, block_size = item.sequence, self.blocks.block_size
        end = sequence.computed + item.count
        missing = -(-(end + count) // block_size) - len(sequence.blocks)
        free = min(missing, self.blocks.available)
        if free > 0:
            sequence.blocks += self.blocks.allocate(free) or ()
        return min(count, len(sequence.blocks) * block_size - end)

    def _admit(self, budget: int, now: float) -> list[Scheduled]:
        admitted = []
        while budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.preempted[0] if self.preempted else self.waiting.next(self._is_ready)
            if sequence is None or not self._place(sequence):
                break
            if self.preempted:
                self.preempted.pop(0)
            else:
                self.waiting.take(sequence)
            self.running.append(sequence)
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
            count = min(sequence.remaining, budget)
            if not self._grow(sequence, count):
                raise RuntimeError("_place left too few blocks for the sequence it placed")
            admitted.append(self._scheduled(sequence, count))
            budget -= count
        return admitted

    def _holder(self) -> Claims:
        if self._claims is None:
            raise RuntimeError("a sequence with adapters in an engine without adapters")
        return self._claims

    def _is_ready(self, sequence: Sequence) -> bool:
        return not sequence.digests() or self._holder().ready(sequence.request_id) is not None

    def _place(self, sequence: Sequence) -> bool:
        """Take the prefix that is cached, if what is left of the sequence has room."""
        block_size = self.blocks.block_size
        # At least one token is computed: its hidden state gives the next one.
        full = (len(sequence.tokens) - 1) // block_size
        found = self.blocks.match(sequence.keys_of_full_blocks(full, block_size))
        needed = -(-(len(sequence.tokens) + 1) // block_size) - len(found)
        if needed > self.blocks.available:
            self.blocks.release(found)
            return False
        sequence.blocks = found
        sequence.computed = len(found) * block_size
        sequence.committed = len(found)
        self.prefix_query_tokens += len(sequence.tokens)
        self.prefix_hit_tokens += sequence.computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from the last admitted where none are left.
        False if it was this sequence itself that had to give way."""
        have = len(sequence.blocks)
        needed = -(-(sequence.computed + count) // self.blocks.block_size) - have
        while needed > 0:
            blocks = self.blocks.allocate(needed)
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_blocks(sequence)
        insort(self.preempted, sequence, key=lambda s: s.arrival)
        self.preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        self._free_blocks(sequence)
        if sequence.digests():
            self._holder().release(sequence.request_id)
        del self._sequences[sequence.request_id]

    def _free_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.committed = 0

    def _commit_full_blocks(self, sequence: Sequence) -> None:
        block_size = self.blocks.block_size
        full = sequence.computed // block_size
        keys = sequence.keys_of_full_blocks(full, block_size)
        for index in range(sequence.committed, full):
            self.blocks.commit(sequence.blocks[index], keys[index])
        sequence.committed = full

    def _scheduled(self, sequence: Sequence, count: int) -> Scheduled:
        if not sequence.digests():
            return Scheduled(sequence, count, ())
        slots = self._holder().ready(sequence.request_id)
        if slots is None:
            raise RuntimeError(f"{sequence.request_id} runs without its adapters on the device")
        components = tuple((slots[c.digest], c.weight) for c in sequence.adapters)
        heads = None if sequence.heads is None else slots[sequence.heads]
        return Scheduled(sequence, count, components, heads)
