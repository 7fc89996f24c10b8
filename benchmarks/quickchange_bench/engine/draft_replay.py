"""Replay of recorded outputs: the engine's own speculation, at known prices, step by step.

Everything that `Speculation` sees is as in the engine: sequences, planned items, results, times.
The device is left out: which drafts hold is in the recording, and what a step takes is its price,
which speculation sees with noise. All steps decode; prompts cost nothing, so that what drafts bring
is not thinned. A step's time has the host's own in speculation, as measured while replaying.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from quickchange_bench.engine.draft_recording import HeadNode, MachinePrices, RecordedTask
from quickchange_server.engine.sampler import SampledToken
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.scheduling.sequence import Sequence as EngineSequence
from quickchange_server.engine.step_results import Ran, Result
from quickchange_server.protocol import Component, Drafting, SamplingParams, Submit
from quickchange_server.spec_decode.cost_model import StepCost
from quickchange_server.spec_decode.draft_heads import Guide
from quickchange_server.spec_decode.prompt_lookup import TokenText
from quickchange_server.spec_decode.speculator import NoSpeculation, Speculation

MAX_MODEL_LEN = 2_048
BATCH_TOKENS = 512  # rows of a step, at most
_NOISE = 0.05  # largest part by which a step seems to take less or more
_REQUESTS_A_LANE = 16  # at least
_UNKNOWN = HeadNode(0, 0.0, None, 0)  # behind drafts that the recording does not have

Clock = Callable[[], float]


class PricedMachine:
    """Seconds of steps and of drafting, as they truly are."""

    def __init__(self, prices: MachinePrices) -> None:
        self.steps = prices.steps
        self._table = StepCost(prices.steps).table(BATCH_TOKENS)
        self._items, self._passes = np.array(prices.passes).T

    def step(self, rows: int) -> float:
        return float(self._table[rows])

    def rows(self, most: int) -> NDArray[np.float64]:
        """Seconds [most + 1] of steps of 0, 1, …, `most` rows."""
        return self._table[: most + 1]

    def drafting(self, depths: Sequence[int]) -> float:
        """Seconds of a drafting call to `depths`: sequences that want fewer leave later passes."""
        wanted = [
            sum([depth > level for depth in depths]) for level in range(max(depths, default=0))
        ]
        return float(np.interp(wanted, self._items, self._passes).sum())


@dataclass
class Played:
    """Sums over the steps of a replay."""

    tokens: int = 0
    seconds: float = 0.0  # all together
    host: float = 0.0  # of them, the host's in speculation
    drafting: float = 0.0  # of them, the heads'
    steps: int = 0
    sequences: int = 0  # sums over steps
    rows: int = 0  # bought
    unknown: int = 0  # drafts of heads that the recording lacks

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def host_a_sequence(self) -> float:
        """The host's seconds for a sequence in a step."""
        return self.host / self.sequences

    def __sub__(self, other: Played) -> Played:
        return Played(*(getattr(self, f) - getattr(other, f) for f in self.__dataclass_fields__))


def workload(task: RecordedTask, lanes: int) -> Iterator[int]:
    """Indices of the texts that are asked for: each once at least."""
    return islice(cycle(range(len(task.texts))), max(len(task.texts), _REQUESTS_A_LANE * lanes))


@dataclass
class _Lane:
    text: int
    sequence: EngineSequence
    output: tuple[int, ...]
    nodes: Sequence[Mapping[tuple[int, ...], HeadNode]]

    def result(self, drafts: Sequence[int]) -> tuple[int, ...]:
        """The tokens that a step with these drafts gives."""
        rest = self.output[self.sequence.output_length :]
        held = 0
        while held < min(len(drafts), len(rest) - 1) and drafts[held] == rest[held]:
            held += 1
        return rest[: held + 1]


@dataclass
class DraftReplay:
    """Plays one task with `lanes` sequences at once. text: for lookups by words."""

    task: RecordedTask
    lanes: int
    machine: PricedMachine
    text: TokenText
    clock: Clock = time.thread_time
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def off(self) -> list[Played]:
        """Running sums behind each step, without drafts."""
        return self._played(NoSpeculation())

    def online(self, speculation: Speculation | None = None) -> list[Played]:
        """The same with the engine's speculation; None: a new one, which has learned nothing."""
        if speculation is None:
            depth = self.task.depth
            cost = StepCost(self.machine.steps)
            speculation = Speculation(cost, lambda _: depth, MAX_MODEL_LEN, self.text, self.clock)
        return self._played(speculation)

    def _played(self, speculation: Speculation | NoSpeculation) -> list[Played]:
        asked = enumerate(workload(self.task, self.lanes))
        running = [self._lane(number, text) for number, text in islice(asked, self.lanes)]
        sums, found = Played(), []
        while True:
            self._step(running, speculation, sums)
            found.append(replace(sums))
            for place, lane in enumerate(running):
                if lane.sequence.output_length == len(lane.output):
                    following = next(asked, None)
                    if following is None:
                        return found
                    running[place] = self._lane(*following)

    def _lane(self, number: int, text: int) -> _Lane:
        own = self.task.texts[text]
        sampling = SamplingParams(
            max_tokens=MAX_MODEL_LEN // 2, temperature=0.0, stop_token_ids=self.task.stop
        )
        adapters = (Component("adapter"),) if self.task.adapted else ()
        drafting = Drafting("heads", lookup=True)
        request = Submit(str(number), own.prompt, sampling, adapters, drafting=drafting, seed=0)
        sequence = EngineSequence(request, 0.0)
        sequence.computed = len(own.prompt) - 1
        return _Lane(text, sequence, own.output, own.drafts)

    def _step(
        self, running: Sequence[_Lane], speculation: Speculation | NoSpeculation, sums: Played
    ) -> None:
        plan = [Scheduled(lane.sequence, 1, (), heads=0) for lane in running]
        begun = self.clock()
        bought = speculation.buy(plan, BATCH_TOKENS - len(plan))
        if bought:
            plan = [
                replace(item, drafts=drafts) if drafts else item
                for item, drafts in zip(plan, bought, strict=True)
            ]
        depths = speculation.depths(plan)
        host = self.clock() - begun
        tokens = [lane.result(item.drafts) for lane, item in zip(running, plan, strict=True)]
        drafts, guiding = self._drafts(running, plan, tokens, depths, speculation, sums)
        drafting = self.machine.drafting([*depths.values()])
        rows = sum([item.rows for item in plan])
        seconds = self.machine.step(rows)
        shown = seconds * self._chance.uniform(1 - _NOISE, 1 + _NOISE)
        results = [
            Result(tuple([SampledToken(token) for token in own]), ahead)
            for own, ahead in zip(tokens, drafts, strict=True)
        ]
        ran = Ran(results, shown, drafting + guiding if depths else None)
        begun = self.clock()
        speculation.observe(plan, ran, speculation.under_way())
        host += self.clock() - begun + guiding
        for lane, own in zip(running, tokens, strict=True):
            for token in own:
                lane.sequence.take(token)
            lane.sequence.computed += len(own)
        sums.tokens += sum(map(len, tokens))
        sums.seconds += seconds + drafting + host
        sums.host += host
        sums.drafting += drafting
        sums.steps += 1
        sums.sequences += len(plan)
        sums.rows += rows - len(plan)

    def _drafts(
        self,
        running: Sequence[_Lane],
        plan: Sequence[Scheduled],
        tokens: Sequence[tuple[int, ...]],
        depths: Mapping[str, int],
        speculation: Speculation | NoSpeculation,
        sums: Played,
    ) -> tuple[list[tuple[tuple[int, float], ...]], float]:
        """The heads' drafts behind each sequence's new tokens, and the guide's seconds."""
        none: list[tuple[tuple[int, float], ...]] = [() for _ in plan]
        wanted = [at for at, lane in enumerate(running) if depths.get(lane.sequence.request_id)]
        if not wanted:
            return none, 0.0
        begun = self.clock()
        guide: Guide | None = speculation.guide([plan[at] for at in wanted])
        if guide is not None:
            held = [len(tokens[at]) - 1 for at in wanted]
            guide.begin([tokens[at][-1] for at in wanted], held)
        guiding = self.clock() - begun
        own = [depths[running[at].sequence.request_id] for at in wanted]
        trees = [
            running[at].nodes[running[at].sequence.output_length + len(tokens[at]) - 1]
            for at in wanted
        ]
        paths: list[tuple[int, ...]] = [()] * len(wanted)
        chances: list[list[float]] = [[] for _ in wanted]
        for level in range(max(own)):
            nodes = [
                tree.get(path, _UNKNOWN) if level < depth else _UNKNOWN
                for tree, path, depth in zip(trees, paths, own, strict=True)
            ]
            sums.unknown += sum(
                [n is _UNKNOWN and level < d for n, d in zip(nodes, own, strict=True)]
            )
            drafted = [node.token for node in nodes]
            if guide is not None:
                begun = self.clock()
                drafted = guide.revise(drafted, [node.chance for node in nodes])
                guiding += self.clock() - begun
            paths = [(*path, token) for path, token in zip(paths, drafted, strict=True)]
            for mine, node in zip(chances, nodes, strict=True):
                mine.append(node.chance)
        for at, path, mine, depth in zip(wanted, paths, chances, own, strict=True):
            none[at] = tuple(zip(path, mine, strict=True))[:depth]
        return none, guiding if guide is not None else 0.0
