"""The scheduler loses nothing, oversteps no budget, and ends every sequence, whatever comes.

A step's tokens become known before the next one is scheduled, or one step later.
With recurrent layers, each of its rows reads the state behind the tokens before it, and no other.
With virtual tokens, each row finds the keys of all that stands in front of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quickchange_server.adapters.prompts.held_prompt import HeldPrompt
from quickchange_server.engine.inputs.step_shapes import PlanShape, exact_extent
from quickchange_server.engine.inputs.virtual_inputs import virtual_inputs
from quickchange_server.engine.model_inputs import step_inputs
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks, StateRows
from quickchange_server.engine.scheduling.scheduler import Scheduled, Scheduler
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.model.forward_context import FIRST_STATE, ZERO_STATE
from quickchange_server.protocol import Component, Drafting, SamplingParams, Submit

MAX_MODEL_LEN = 24
MAX_BATCH_TOKENS = 8
MAX_SEQUENCES = 4
CPU = torch.device("cpu")


Flight = list[tuple[Scheduled, list[int]]]  # a launched step's items, and the tokens to come


class FakeClaims:
    """Adapters that become ready, or fail, when the test says so."""

    def __init__(self, prompts: Mapping[str, HeldPrompt]) -> None:
        self.prompts = prompts
        self.claimed: dict[str, list[str]] = {}
        self.loaded: set[str] = set()
        self.broken: set[str] = set()

    def claim(self, key: str, digests: list[str]) -> None:
        assert key not in self.claimed
        self.claimed[key] = digests

    def ready(self, key: str) -> Mapping[str, int] | None:
        digests = self.claimed[key]
        return {d: ord(d[0]) for d in digests} if set(digests) <= self.loaded else None

    def failed(self, key: str) -> str | None:
        broken = set(self.claimed[key]) & self.broken
        return f"{broken} can't be loaded" if broken else None

    def prompt(self, digest: str) -> HeldPrompt | None:
        return self.prompts.get(digest)

    def release(self, key: str) -> None:
        del self.claimed[key]


class FakeDrafts:
    """Buys as many drafts as the test says, for sequences that decode, where drafts can count."""

    def __init__(self) -> None:
        self.wanted = 0

    def buy(self, plan: Seq[Scheduled], room: int) -> list[tuple[int, ...]]:
        bought = []
        for item in plan:
            sequence = item.sequence
            count = 0
            if sequence.drafting is not None and item.count == 1 and item.samples:
                left = sequence.request.sampling.token_limit - sequence.output_length - 1
                count = max(min(self.wanted, room, left), 0)
            room -= count
            bought.append((0,) * count)
        return bought


def terms_at(sequence: Sequence, row: int) -> list[Component]:
    """The adapters that the row at a position takes; virtual tokens take the text's first ones."""
    position = max(row - sequence.virtual, 0)
    return [
        term
        for term in sequence.request.adapters
        if term.begin <= position and (term.end is None or position < term.end)
    ]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go; each step gives every sampling sequence a token."""

    states: StateRows | None = None
    prompts: Mapping[str, HeldPrompt] = {}  # by adapter

    def __init__(self) -> None:
        super().__init__()
        self.claims = FakeClaims(self.prompts)
        self.drafts = FakeDrafts()
        self.scheduler = Scheduler(
            KVBlocks(8, 4),
            self.claims,
            self.drafts,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
            states=self.states,
        )
        self.alive: dict[str, Sequence] = {}
        self.counter = 0
        self.flights: deque[Flight] = deque()
        self.wasted: Counter[str] = Counter()  # steps with rows of a sequence that had ended

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN - 1),
        adapters=st.lists(st.sampled_from("xyz"), max_size=2, unique=True),
        begin=st.sampled_from([0, 0, 3, 9]),
        length=st.sampled_from([None, 1, 6]),
        max_tokens=st.integers(1, 12),
        drafting=st.sampled_from([None, Drafting(lookup=True), Drafting("x"), Drafting("z", True)]),
        background=st.booleans(),
    )
    def submit(
        self,
        prompt: list[int],
        adapters: list[str],
        begin: int,
        length: int | None,
        max_tokens: int,
        drafting: Drafting | None,
        background: bool,
    ) -> None:
        self.counter += 1
        front = {name: self.prompts[name].tokens for name in adapters if name in self.prompts}
        if len(front) > 1:
            return  # the engine refuses it
        prompt = prompt[: MAX_MODEL_LEN - 1 - sum(front.values())]
        sequence = Sequence(
            Submit(
                f"r{self.counter}",
                tuple(prompt),
                SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({7})),
                tuple(
                    Component(name, virtual_tokens=front[name])
                    if front.get(name)
                    else Component(name, 1.0, begin, length and begin + length)
                    for name in adapters
                ),
                drafting=drafting,
                background=background,
                seed=0,
            ),
            arrival=float(self.counter),
        )
        self.alive[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    @rule(digest=st.sampled_from("xyz"))
    def adapter_arrives(self, digest: str) -> None:
        if digest not in self.claims.broken:
            self.claims.loaded.add(digest)

    @rule(digest=st.sampled_from("xyz"))
    def adapter_breaks(self, digest: str) -> None:
        if digest not in self.claims.loaded:
            self.claims.broken.add(digest)
            for sequence, _ in self.scheduler.failures():
                del self.alive[sequence.request_id]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.cancel(request_id)
        del self.alive[request_id]

    @rule(
        token=st.sampled_from([0, 1, 7]),
        drafts=st.integers(0, 6),
        held=st.integers(0, 6),
        stays=st.booleans(),
    )
    def step(self, token: int, drafts: int = 0, held: int = 0, stays: bool = False) -> None:
        """stays: the step is still in flight when the next one is scheduled, if it may be."""
        for sequence, _ in self.scheduler.failures():
            del self.alive[sequence.request_id]
        self.drafts.wanted = drafts
        plan = self.scheduler.schedule(now=0.0)
        if any(not item.sequence.request.background for item in plan):
            behind = sum(item.rows for item in plan if item.sequence.request.background)
            assert behind <= MAX_BATCH_TOKENS // 8
        assert sum(item.rows for item in plan) <= MAX_BATCH_TOKENS
        assert len({id(item.sequence) for item in plan}) == len(plan)
        for item in plan:
            room = len(item.sequence.blocks) * 4
            assert item.sequence.computed + item.rows <= room, "rows without a block"
            for row in range(item.first, item.first + item.rows):
                (run,) = item.runs(row, row + 1)
                there = terms_at(item.sequence, row)
                assert [slot for slot, _ in run.components] == [ord(t.digest) for t in there]
            assert (item.heads is None) == (item.sequence.heads is None)
        self.compute(plan)
        self.scheduler.launched(plan)
        self.flights.append(
            [(item, [*item.drafts[:held], token] if item.samples else []) for item in plan]
        )
        must_settle = any(item.samples and item.sequence.needs_its_tokens for item in plan)
        while len(self.flights) > (stays and bool(plan) and not must_settle):
            self.settle(self.flights.popleft())

    def settle(self, flight: Flight) -> None:
        for item, tokens in flight:
            if not self.scheduler.holds(item.sequence):
                self.wasted[item.sequence.request_id] += 1
                continue
            before = item.sequence.output_length
            taken, reason = self.scheduler.settled(item, tokens)
            assert item.sequence.output_length == before + taken
            if reason:
                del self.alive[item.sequence.request_id]
            else:
                assert taken == len(tokens), "a token of a sequence that goes on is lost"

    def known(self, item: Scheduled) -> list[int]:
        """The text that the item's rows are made of."""
        sequence = item.sequence
        in_flight = [tokens for f in self.flights for of, tokens in f if of.sequence is sequence]
        front = [-1] * sequence.virtual
        return [
            *front,
            *sequence.tokens,
            *(t for tokens in in_flight for t in tokens),
            *item.drafts,
        ]

    def compute(self, plan: Seq[Scheduled]) -> None:
        """What the model does with a plan."""

    @invariant()
    def intact(self) -> None:
        self.scheduler.check_integrity([item.sequence for f in self.flights for item, _ in f])
        assert all(rows <= 1 for rows in self.wasted.values()), "more than one step is wasted"
        assert len(self.scheduler) == len(self.alive)
        needing = {r: s for r, s in self.alive.items() if s.digests}
        assert {r for r, s in needing.items() if not s.request.background} <= set(
            self.claims.claimed
        )
        assert set(self.claims.claimed) <= set(needing)
        for sequence in self.scheduler.running:
            assert sequence.request_id not in needing or sequence.request_id in self.claims.claimed

    def teardown(self) -> None:
        self.claims.loaded = set("xyz") - self.claims.broken
        for _ in range(10_000):
            if not self.alive:
                return
            self.step(0)
            self.intact()
        raise AssertionError(f"never ended: {sorted(self.alive)}")


class RecurrentMachine(SchedulerMachine):
    """A machine with a model whose state is the list of all tokens so far."""

    prompts: Mapping[str, HeldPrompt] = {"y": HeldPrompt(torch.zeros(5, 1), cached=False)}

    def __init__(self) -> None:
        self.states = StateRows(MAX_SEQUENCES + 1, 3)
        self.pool: dict[int, tuple[int, ...]] = {ZERO_STATE: ()}
        super().__init__()

    def compute(self, plan: Seq[Scheduled]) -> None:
        if not plan:
            return
        shape = PlanShape.of(plan)
        inputs = step_inputs(plan, shape, exact_extent(plan, shape, CPU), 4, CPU)
        ids, owners = inputs.ids.tolist(), [item for item in plan for _ in range(item.rows)]
        for part in inputs.states:
            rows = range(len(ids)) if part.rows is None else part.rows.tolist()
            read = [ZERO_STATE] if part.read is None else part.read.tolist()
            states = [self.pool[row] for row in read]
            for index, write in enumerate(part.write.tolist()):
                state = states[index]
                for row in rows[index * part.length :][: part.length]:
                    item, position = owners[row], int(inputs.positions[row])
                    known = self.known(item)
                    assert [*state] == known[:position], "another state than that before the row"
                    fed = bool(item.sequence.pending)  # the item's only row
                    assert fed or ids[row] == max(known[position], 0)
                    state = (*state, known[position])
                assert write >= FIRST_STATE
                self.pool[write] = state


class VirtualMachine(SchedulerMachine):
    """A machine with a model whose keys are tokens up to each position, and what these took.

    Two adapters have virtual tokens, vectors and keys, whose values say which they are.
    """

    def __init__(self) -> None:
        self.slots: dict[int, Any] = {}
        super().__init__()

    @staticmethod
    def prompts_of(vectors: int, keys: int) -> dict[str, HeldPrompt]:
        return {
            "x": HeldPrompt(torch.arange(float(vectors))[:, None], cached=False),
            "y": HeldPrompt(torch.arange(float(keys))[:, None], cached=True),
        }

    def compute(self, plan: Seq[Scheduled]) -> None:
        if not plan:
            return
        shape = PlanShape.of(plan)
        inputs = step_inputs(plan, shape, exact_extent(plan, shape, CPU), 4)
        virtual = virtual_inputs(plan, 4)
        given: dict[int, float] = {}
        if virtual is not None and virtual.slots is not None and virtual.cache is not None:
            cached = zip(virtual.slots.tolist(), virtual.cache[:, 0].tolist(), strict=True)
            self.slots |= {slot: ("given", token) for slot, token in cached}
        if virtual is not None and virtual.rows is not None and virtual.vectors is not None:
            given = dict(zip(virtual.rows.tolist(), virtual.vectors[:, 0].tolist(), strict=True))
        row = 0
        for item in plan:
            sequence, known = item.sequence, self.known(item)
            for position in range(item.first, item.first + item.rows):
                if position < sequence.virtual:
                    assert given.pop(row) == position, "another virtual token than the row's"
                else:
                    fed = bool(sequence.pending)
                    assert fed or int(inputs.ids[row]) == known[position]
                slot = int(inputs.slots[row])
                assert int(inputs.positions[row]) == position
                self.slots[slot] = self.key(sequence, known, position)
                for before in range(position):
                    at = sequence.blocks[before // 4] * 4 + before % 4
                    assert self.slots[at] == self.key(sequence, known, before), "a key is missing"
                row += 1
        assert not given, "vectors for rows that are no virtual tokens"

    def key(self, sequence: Sequence, known: list[int], position: int) -> Any:
        cached = sequence.prompt is not None and sequence.prompt.cached
        if cached and position < sequence.virtual:
            return "given", float(position)
        taken = tuple(
            frozenset((term.digest, term.weight) for term in terms_at(sequence, row))
            for row in range(position + 1)
        )
        return taken, tuple(known[: position + 1])


class ShortPromptsMachine(VirtualMachine):
    prompts = VirtualMachine.prompts_of(3, 2)


class LongPromptsMachine(VirtualMachine):
    prompts = VirtualMachine.prompts_of(9, 10)


class WholeBlocksMachine(VirtualMachine):
    prompts = VirtualMachine.prompts_of(8, 4)


for machine in (ShortPromptsMachine, LongPromptsMachine, WholeBlocksMachine):
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestShortPrompts = ShortPromptsMachine.TestCase
TestLongPrompts = LongPromptsMachine.TestCase
TestWholeBlocksOfPrompts = WholeBlocksMachine.TestCase
TestRecurrentScheduler = RecurrentMachine.TestCase
TestRecurrentScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
