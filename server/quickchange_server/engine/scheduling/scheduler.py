"""The scheduler: chooses the sequences of each step and the number of tokens each of them computes.

Continuous batching with chunked prefill: every running sequence gets its next rows, decode rows
first (one each); the rest of the row budget goes to prefill chunks in order of admission. When KV
blocks run out, the sequence admitted last gives its blocks back and is computed anew later
(preemption by recompute; what the prefix cache still holds is found again). Rows and free blocks
that are left may go to drafts of decoding sequences. Knows nothing of tensors or text.

Background sequences run on what the others, the foreground, leave. They are admitted while no
foreground sequence waits, are preempted before any of these, and get the rows that are left: all of
them in a step of their own, an eighth of the budget at most beside others, which bounds how much
longer they make a step that somebody waits for. They claim adapters while nobody in the foreground
waits, and give them back when somebody does: at the end of a step that could not admit it. Their
other effects on the foreground: they may evict adapters and cached prefixes that no request is
using, and a load that has begun is not broken off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Protocol

from quickchange_server.adapters.batch_segments import Components, Run, Stretches, runs_between
from quickchange_server.engine.scheduling.adapter_claims import Claims, Holdings
from quickchange_server.engine.scheduling.fair_queue import Lane
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks, StateRows
from quickchange_server.engine.scheduling.sequence import (
    NO_ROWS,
    Border,
    Sequence,
    isolated,
)
from quickchange_server.protocol import FinishReason

_COMPONENTS = attrgetter("components")
_MOST_SCORED = 256  # prompt rows of a step whose logits are read: [256, V] is held at once
_BESIDE = 8  # beside foreground rows, the background gets one of so many rows of the budget


@dataclass(slots=True, eq=False)
class Scheduled:
    """Rows of one sequence in a step: positions [first, first + count), then drafts.

    It says what the step computes of the sequence, which goes on while the step is in flight.
    """

    sequence: Sequence
    count: int
    components: Components  # of all its rows; of the last one where `stretches` tell them apart
    heads: int | None = None  # device slot of its Turbo heads
    drafts: tuple[int, ...] = ()  # tokens to verify, in order
    stretches: Stretches = ()  # of its text; empty: all of it is under `components`
    first: int = field(init=False)
    # True if the sequence's last token is among these rows, so that a new one is sampled.
    samples: bool = field(init=False)
    prefills: bool = field(init=False)  # it had more than its last token to compute
    # Positions of the rows whose logits are read for the prompt's log-probabilities, and of those
    # whose hidden states are read for an embedding.
    scored: range = field(init=False)
    pooled: range = field(init=False)
    virtual: range = field(init=False)  # positions of virtual tokens that the step is given
    rows: int = field(init=False)
    sampled_rows: int = field(init=False)  # number of rows, the last ones, that are sampled
    pends: bool = field(default=False, init=False)  # see `Sequence.pending`; set at the launch

    def __post_init__(self) -> None:
        sequence, remaining, drafts = self.sequence, self.sequence.remaining, len(self.drafts)
        self.first = sequence.computed
        self.samples = self.count == remaining and sequence.generates
        self.prefills = remaining > 1
        self.rows = self.count + drafts
        self.sampled_rows = 1 + drafts if self.samples else 0
        self.virtual = sequence.virtual_rows(self.count) if sequence.virtual else NO_ROWS
        self.scored = self.pooled = NO_ROWS
        if (reading := sequence.reading) is not None:
            front = sequence.virtual
            rows = reading.rows(self.first - front, self.count)
            rows = range(rows.start + front, rows.stop + front)
            if reading.top is None:
                self.pooled = rows
            else:
                self.scored = rows
        if self.stretches:
            self.components = self.runs(self.first, self.first + self.rows)[-1].components

    def runs(self, begin: int, end: int) -> list[Run]:
        """Its rows at positions [begin, end), which are not empty, by the adapters they take."""
        if not self.stretches:
            return [Run(end - begin, self.components)]
        return runs_between(self.stretches, begin, end)


class DraftBuyer(Protocol):
    """The part of speculation that decides which drafts are worth their rows."""

    def buy(self, plan: Seq[Scheduled], room: int) -> Seq[tuple[int, ...]]:
        """Drafts to verify for each item, at most `room` in all; an empty list: none at all."""
        ...


class Scheduler:
    """Schedules all sequences in the engine and owns their KV blocks and state rows."""

    def __init__(
        self,
        blocks: KVBlocks,
        claims: Claims,
        drafts: DraftBuyer,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        states: StateRows | None = None,
    ) -> None:
        """states: rows for the states of recurrent layers; None: the model has no such."""
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
        self.states = states
        self._holdings = Holdings(claims)
        self._drafts = drafts
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.foreground, self.background = Lane(), Lane()
        self.running: list[Sequence] = []  # in order of admission
        self._sequences: dict[str, Sequence] = {}
        self._outgrown: list[Sequence] = []  # to be computed anew
        self._scorable = 0  # prompt rows whose logits the coming step may still read
        self.faults: dict[str, str] = {}  # request ids that the last `schedule` left out, and why
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def claims_changed(self) -> bool:
        """True if the last `schedule` lent adapters or took some back: the tiers must be polled."""
        return self._holdings.changed

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait; a foreground one claims its adapters."""
        if not sequence.request.background and sequence.digests:
            self._take_back([s for s in self._holdings.lent if s not in self.running])
            self._holdings.claim(sequence)
        self._sequences[sequence.request_id] = sequence
        self._lane(sequence).waiting.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a sequence in any state; an unknown id is one that has already ended."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._lane(sequence).remove(sequence)
        self._end(sequence)

    def failures(self) -> list[tuple[Sequence, str]]:
        """Remove and return waiting sequences whose adapters failed to load, with the errors."""
        failed = [
            (sequence, error)
            for sequence in (*self.foreground.waiting, *self._holdings.lent)
            if (error := self._holdings.failure(sequence)) is not None
        ]
        for sequence, _ in failed:
            self.cancel(sequence.request_id)
        return failed

    def schedule(self, now: float) -> list[Scheduled]:
        """Plan the coming step. now: seconds on the clock of the sequences' arrival.

        Sequences that can't be admitted, or for which no drafts can be made, because of an error of
        their own, are in `faults` and not in the plan: the owner cancels them.
        """
        self.faults = {}
        self._holdings.changed = False
        self._scorable = _MOST_SCORED
        if self._outgrown:
            self._begin_anew()
        preemptions = self.preemptions
        running = [sequence for sequence in self.running if not sequence.request.background]
        plan = self._go_on(running, self.max_batch_tokens)
        if self.foreground and len(running) == self._running_foreground():
            plan += self._admit(self.foreground, self.max_batch_tokens - _rows(plan), now)
        plan = self._with_drafts(plan)
        if self.background or len(self.running) > self._running_foreground():
            plan += self._behind(plan, now, admitting=self.preemptions == preemptions)
        # Rows under the same adapters side by side: one segment, whose weights are read once.
        plan.sort(key=_COMPONENTS)
        return plan

    def launched(self, items: Iterable[Scheduled]) -> None:
        """Record that `items` were given to the device: what comes next may build on their rows."""
        for item in items:
            sequence = item.sequence
            sequence.computed += item.count
            sequence.written = sequence.virtual
            if item.samples and sequence.goes_on_behind(sequence.computed + 1, self.max_model_len):
                item.pends = True
                sequence.pending += 1
            if self.states is not None and not item.drafts:
                self._advance_state(self.states, sequence, 0)
            if item.prefills:
                self._commit_full_blocks(sequence)

    def settled(self, item: Scheduled, tokens: Seq[int]) -> tuple[int, FinishReason | None]:
        """Record that a launched `item` was computed and its prompt rows were read.

        tokens: the sampled ones, one more than accepted drafts; none if the item does not sample,
        or no token could be chosen. Returns how many of them count (none after the first that ends
        the sequence), and the reason if the sequence ended.
        """
        sequence = item.sequence
        sequence.pending -= item.pends
        taken = 0
        reason = None
        if not sequence.generates and item.first + item.count == sequence.length:
            reason = sequence.reason_without_output
        for token in tokens:
            sequence.take(token)
            taken += 1
            reason = sequence.finish_reason(self.max_model_len)
            if reason is not None:
                break
        if item.drafts:
            accepted = max(taken - 1, 0)
            if self.states is not None:
                self._advance_state(self.states, sequence, accepted)
            sequence.computed += accepted  # the rows of accepted drafts
        self._commit_full_blocks(sequence)
        if reason is not None:
            self.cancel(sequence.request_id)
        elif sequence.outgrown and not sequence.pending:
            self._outgrown.append(sequence)
        return taken, reason

    def holds(self, sequence: Sequence) -> bool:
        """True if the sequence has not ended."""
        return self._sequences.get(sequence.request_id) is sequence

    def check_integrity(self, in_flight: Collection[Sequence] = ()) -> None:
        """Raises AssertionError if a sequence or a block is lost, shared or counted twice.

        in_flight: the sequences that are part of a launched step which is not settled.
        """
        self.blocks.check_integrity()
        apart = [*self.foreground, *self.background]
        everywhere = [*self.running, *apart]
        assert {s.request_id for s in everywhere} == set(self._sequences), "a sequence is lost"
        assert len(everywhere) == len(self._sequences), "a sequence in two places"
        assert len(self.running) <= self.max_sequences, "too many running"
        held = {block for s in self.running for block in s.blocks}
        assert len(held) == self.blocks.used, "a used block belongs to no running sequence"
        if self.states is not None:
            self.states.check_integrity()
            rows = [row for s in self.running for row in s.states]
            assert len(set(rows)) == len(rows), "a state row belongs to two sequences"
            assert len(rows) == self.states.used, "a used state row belongs to no running sequence"
            assert all(s.states for s in self.running), "a running sequence without a state row"
            kept = {s.kept_state for s in self.running} - {None}
            assert len(kept) == self.states.held, "a held state belongs to no running sequence"
        for sequence in self.running:
            room = len(sequence.blocks) * self.blocks.block_size
            assert sequence.computed <= room, "more tokens computed than blocks hold"
            left = sequence.remaining >= 1 or sequence in in_flight
            assert left, "nothing left to compute in a running sequence"
            placed = sequence.components, sequence.stretches, sequence.head_slot
            assert placed == self._placed(sequence), "a running sequence's adapters have moved"
        for sequence in everywhere:
            assert 0 <= sequence.pending <= (sequence in in_flight), "a token that never comes"
        for sequence in apart:
            assert not sequence.blocks, "a sequence that isn't running holds blocks"
            rows = [*sequence.states, sequence.kept_state, sequence.border]
            assert not any(rows), "a sequence that isn't running holds state rows"
            assert not sequence.computed, "a sequence that isn't running counts as computed"
        self._holdings.check_integrity(self._sequences)

    def _lane(self, sequence: Sequence) -> Lane:
        return self.background if sequence.request.background else self.foreground

    def _running_foreground(self) -> int:
        return sum([not sequence.request.background for sequence in self.running])

    def _go_on(self, sequences: Seq[Sequence], budget: int) -> list[Scheduled]:
        """Next rows of running sequences, at most `budget`; decode rows come first."""
        plan: list[Scheduled] = []
        preemptions = self.preemptions
        remaining = [sequence.remaining for sequence in sequences]
        decode_budget = budget
        prefill_budget = budget - remaining.count(1)
        for sequence, left in zip(sequences, remaining, strict=True):
            if self.preemptions != preemptions and sequence not in self.running:
                break  # preempted for one before it, as are all after it
            decode = left == 1
            count = self._count(sequence, decode_budget if decode else prefill_budget)
            if count > 0 and self._grow(sequence, count):
                plan.append(self._scheduled(sequence, count))
                if decode:
                    decode_budget -= 1
                else:
                    prefill_budget -= count
        return plan

    def _behind(self, plan: Seq[Scheduled], now: float, *, admitting: bool) -> list[Scheduled]:
        """Background rows beside the foreground's `plan`. admitting: new sequences may start."""
        if self.foreground:
            self._take_back(self._holdings.lent)
        room = self.max_batch_tokens - _rows(plan)
        if plan or self.foreground:
            room = min(room, max(self.max_batch_tokens // _BESIDE, 1))
        running = [sequence for sequence in self.running if sequence.request.background]
        behind = self._go_on(running, room)
        if admitting and not self.foreground and all(s in self.running for s in running):
            self._holdings.lend(self.background.candidates()[: self.max_sequences])
            behind += self._admit(self.background, room - _rows(behind), now)
        return behind

    def _take_back(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self.running:
                self._preempt(sequence)
            self._holdings.take_back(sequence)

    def _with_drafts(self, plan: list[Scheduled]) -> list[Scheduled]:
        room = self.max_batch_tokens - _rows(plan)
        sound, bought = isolated(plan, lambda items: self._drafts.buy(items, room), self.faults)
        if not bought:
            return [*sound]
        return [
            replace(item, drafts=tokens[: self._room_for_drafts(item, len(tokens))])
            if tokens
            else item
            for item, tokens in zip(sound, bought, strict=True)
        ]

    def _room_for_drafts(self, item: Scheduled, count: int) -> int:
        """Number of drafts that have room in the caches; nobody is preempted for them."""
        sequence, block_size = item.sequence, self.blocks.block_size
        count = max(min(count, sequence.room_in_reach), 0)
        end = sequence.computed + item.count
        missing = -(-(end + count) // block_size) - len(sequence.blocks)
        free = min(missing, self.blocks.available)
        if free > 0:
            sequence.blocks += self.blocks.allocate(free) or ()
        count = min(count, len(sequence.blocks) * block_size - end)
        if self.states is None:
            return count
        rows = self.states.allocate(count)
        sequence.states += rows
        return len(rows)

    def _admit(self, lane: Lane, budget: int, now: float) -> list[Scheduled]:
        admitted = []
        while budget > 0 and self._has_place(lane):
            sequence = lane.next(self._holdings.is_ready)
            if sequence is None:
                break
            if (fault := self._holdings.take_prompt(sequence)) is not None:
                self.cancel(sequence.request_id)
                self.faults[sequence.request_id] = fault
                continue
            if not self._place(sequence):
                break
            if len(self.running) == self.max_sequences:
                self._preempt(self._last())
            lane.take(sequence)
            self.running.append(sequence)
            placed = self._placed(sequence)
            sequence.components, sequence.stretches, sequence.head_slot = placed
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
            count = self._count(sequence, budget)
            if not self._grow(sequence, count):
                raise RuntimeError("_place left too few blocks for the sequence it placed")
            if count:
                admitted.append(self._scheduled(sequence, count))
            budget -= count
        return admitted

    def _count(self, sequence: Sequence, budget: int) -> int:
        """Number of rows that a sequence computes next, within `budget`."""
        count = min(sequence.remaining, budget)
        reading = sequence.reading
        if reading is None or reading.top is None or reading.complete:
            return count
        count = min(count, self._scorable)
        self._scorable -= count
        return count

    def _has_place(self, lane: Lane) -> bool:
        """True if one more of the lane may run, in place of a background sequence if need be."""
        others = len(self.running) if lane is self.background else self._running_foreground()
        return others < self.max_sequences

    def _last(self) -> Sequence:
        """The running sequence that is preempted first."""
        behind = (sequence for sequence in reversed(self.running) if sequence.request.background)
        return next(behind, self.running[-1])

    def _place(self, sequence: Sequence) -> bool:
        """Take the cached prefix, if the rest of the sequence has room; False if it has none.

        The background is preempted for the foreground.
        """
        block_size = self.blocks.block_size
        full = sequence.reusable // block_size
        keys = sequence.keys_of_full_blocks(full, block_size)
        found = self.blocks.match(keys)
        state = None
        if self.states is not None and found:
            with_state, state = self.states.find(keys[: len(found)])
            self.blocks.release(found[with_state:])
            found = found[:with_state]
        most = sequence.length + sequence.generates
        needed = -(-most // block_size) - len(found)
        while needed > self.blocks.available or (self.states and not self.states.available):
            if sequence.request.background or len(self.running) == self._running_foreground():
                self.blocks.release(found)
                if self.states is not None:
                    self.states.let_go(state)
                return False
            self._preempt(self._last())
        if self.states is not None:
            sequence.states, sequence.kept_state = self.states.allocate(1), state
        sequence.blocks = found
        sequence.start_behind(len(found) * block_size)
        sequence.committed = len(found)
        self.prefix_query_tokens += len(sequence.tokens)
        self.prefix_hit_tokens += sequence.text_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.text_computed
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Allocate blocks for `count` more tokens; False if this sequence itself was preempted.

        Where none are left, the last admitted are preempted, those of the background first.
        """
        have = len(sequence.blocks)
        needed = -(-(sequence.computed + count) // self.blocks.block_size) - have
        while needed > 0:
            blocks = self.blocks.allocate(needed)
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = self._last()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_caches(sequence)
        self._lane(sequence).put_back(sequence)
        self.preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        self._free_caches(sequence)
        self._holdings.release(sequence)
        del self._sequences[sequence.request_id]

    def _begin_anew(self) -> None:
        """Let sequences that have outgrown their reach be computed from their beginning."""
        for sequence in self._outgrown:
            if sequence in self.running:
                self._preempt(sequence)
            sequence.begin_anew()
        self._outgrown.clear()

    def _free_caches(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        if self.states is not None:
            self.states.release(sequence.states)
            self.states.let_go(sequence.kept_state)
            self.states.let_go(None if sequence.border is None else sequence.border.row)
            sequence.states, sequence.kept_state, sequence.border = [], None, None
        sequence.computed = sequence.written = sequence.committed = 0
        sequence.prompt = None

    def _plan_border(self, states: StateRows, sequence: Sequence, count: int) -> None:
        """Let the coming `count` rows leave the state behind their last full block to be kept."""
        block_size = self.blocks.block_size
        full = (sequence.computed + count) // block_size
        if full * block_size > sequence.computed and (row := states.room_to_keep()) is not None:
            sequence.border = Border(full * block_size, row)

    def _advance_state(self, states: StateRows, sequence: Sequence, accepted: int) -> None:
        """Hold the state after the last accepted draft, and no row that has another.

        `computed` counts the rows before the drafts.
        """
        states.let_go(sequence.kept_state)
        sequence.kept_state = None
        if (border := sequence.border) is not None:
            full = border.tokens // self.blocks.block_size
            states.keep(border.row, sequence.keys_of_full_blocks(full, self.blocks.block_size)[-1])
            sequence.border = None
            if border.tokens == sequence.computed and not accepted:
                sequence.kept_state = border.row
            else:
                states.let_go(border.row)
        own = sequence.states.pop(accepted)
        states.release(sequence.states)
        sequence.states = [own]

    def _commit_full_blocks(self, sequence: Sequence) -> None:
        block_size = self.blocks.block_size
        full = min(sequence.computed, sequence.length) // block_size
        if full <= sequence.committed:
            return
        keys = sequence.keys_of_full_blocks(full, block_size)
        for index in range(sequence.committed, full):
            self.blocks.commit(sequence.blocks[index], keys[index])
        sequence.committed = full

    def _scheduled(self, sequence: Sequence, count: int) -> Scheduled:
        if self.states is not None and count > 1:
            self._plan_border(self.states, sequence, count)
        components, stretches = sequence.components, sequence.stretches
        return Scheduled(sequence, count, components, sequence.head_slot, stretches=stretches)

    def _placed(self, sequence: Sequence) -> tuple[Components, Stretches, int | None]:
        """Slots of a sequence's adapters and heads, as long as it holds them."""
        slots = self._holdings.slots(sequence)
        stretches = tuple(
            (
                first and sequence.virtual + first,
                tuple([(slots[term.digest], term.weight) for term in terms]),
            )
            for first, terms in sequence.compositions
        )
        heads = None if sequence.heads is None else slots[sequence.heads]
        return stretches[0][1], stretches if len(stretches) > 1 else (), heads


def _rows(plan: Seq[Scheduled]) -> int:
    return sum([item.rows for item in plan])
