"""The whole policy on a machine that is known: never much slower than no drafts, near the best.

Steps are simulated: their true cost, what drafting costs, and which drafts hold. The policy sees
what an engine would see of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest

from quickchange_server.spec_decode.acceptance_rates import Acceptance, Drafter
from quickchange_server.spec_decode.backoff import Backoff
from quickchange_server.spec_decode.cost_model import DraftCost, StepCost
from quickchange_server.spec_decode.draft_depth import DepthPlan, Prospect
from quickchange_server.spec_decode.draft_selection import StepLoad, buy_chains

POINTS = [(1, 0.021), (4, 0.023), (8, 0.026), (16, 0.040), (32, 0.062), (256, 0.370)]
A_PASS, A_DRAFT = 0.0004, 0.00005  # seconds
HEADS = 5
CAP = 160
STEPS = 500

Draft = tuple[float, bool]  # what the head thinks its chance is; whether it would hold
Task = Callable[[random.Random], list[Draft]]


def drafting_seconds(deep: list[int]) -> float:
    return A_PASS * max(deep, default=0) + A_DRAFT * sum(deep)


def accepted(drafts: list[Draft]) -> int:
    count = 0
    for _, holds in drafts:
        if not holds:
            break
        count += 1
    return count


@dataclass
class Machine:
    """Steps of `sequences` decoding sequences whose drafts are as `task` makes them."""

    sequences: int
    task: Task
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    true: StepCost = field(default_factory=lambda: StepCost(POINTS))
    tokens: int = 0
    seconds: float = 0.0

    def draft(self, deep: tuple[int, ...]) -> list[list[Draft]]:
        self.seconds += drafting_seconds(list(deep))
        return [self.task(self.chance)[:d] for d in deep]

    def verify(self, bought: list[list[Draft]]) -> float:
        took = self.true.seconds(self.sequences + sum(map(len, bought)))
        self.seconds += took
        self.tokens += self.sequences + sum(accepted(drafts) for drafts in bought)
        return took * self.chance.uniform(0.95, 1.05)  # as a clock would show it

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def rate_of_policy(sequences: int, task: Task, *, warm: int = 0) -> float:
    """Tokens a second over STEPS steps, after `warm` that don't count."""
    machine = Machine(sequences, task)
    cost, drafting = StepCost(POINTS), DraftCost()
    acceptance, backoff = Acceptance(), Backoff()
    plan = DepthPlan(acceptance, cost, drafting)
    drafter = Drafter("heads", b"")
    load = StepLoad(decoding=sequences, prefill=0, cap=CAP)
    trial: int | None = None  # the sequence whose drafts are verified whatever they are worth
    for step in range(warm + STEPS):
        if step == warm:
            machine.tokens, machine.seconds = 0, 0.0
        if not backoff.awake(sequences):
            machine.verify([[]] * sequences)
            continue
        tokens, seconds = machine.tokens, machine.seconds
        prospects = [Prospect((), drafter, HEADS)] * sequences
        deep = plan.depths(prospects, load)
        if trial is not None:
            deep = (HEADS, *deep[1:])
        drafts = machine.draft(deep)
        if any(deep):
            drafting.observe(deep, drafting_seconds(list(deep)))
        confidences = [[sure for sure, _ in chain] for chain in drafts]
        for chain in filter(None, confidences):
            acceptance.offered(drafter, chain)
        chains = [acceptance.chances(drafter, chain) for chain in confidences]
        purchase = buy_chains(chains, load, cost, trial=trial)
        bought = [chain[:length] for chain, length in zip(drafts, purchase.lengths, strict=True)]
        cost.observe(sequences + sum(purchase.lengths), machine.verify(bought))
        for chain in bought:
            for depth, (sure, holds) in enumerate(chain[: accepted(chain) + 1], 1):
                acceptance.observe(drafter, depth, sure, holds)
                if holds:
                    backoff.held(drafter)
        took = machine.seconds - seconds
        backoff.observe(sequences, machine.tokens - tokens, took, cost.seconds(sequences))
        trial = 0 if backoff.due([drafter]) else None
    return machine.rate


def rate_of_fixed_depth(sequences: int, task: Task, depth: int) -> float:
    machine = Machine(sequences, task)
    for _ in range(STEPS):
        machine.verify(machine.draft((depth,) * sequences))
    return machine.rate


def even(p: float) -> Task:
    """Every draft holds with chance p, and the heads know nothing of which."""
    return lambda chance: [(0.6, chance.random() < p) for _ in range(HEADS)]


def calibrated(chance: random.Random) -> list[Draft]:
    """Half of the chains are nearly sure, half nearly hopeless, and the heads know which."""
    p = chance.choice([0.05, 0.95])
    return [(p, chance.random() < p) for _ in range(HEADS)]


def overconfident(chance: random.Random) -> list[Draft]:
    """Heads trained for something else: sure, and wrong."""
    return [(0.9, chance.random() < 0.05) for _ in range(HEADS)]


# the corners and some between; the whole grid in `make slow`
QUICK = {(1, 0.0), (1, 0.3), (1, 1.0), (4, 0.3), (4, 0.7), (16, 0.7), (32, 0.0), (32, 1.0)}
GRID = [
    pytest.param(*point, marks=() if point in QUICK else pytest.mark.slow)
    for point in product((1, 2, 4, 16, 32), (0.0, 0.3, 0.7, 1.0))
]


@pytest.mark.parametrize(("sequences", "p"), GRID)
def test_drafting_never_costs_three_percent_and_comes_near_the_best_fixed_depth(
    sequences: int, p: float
) -> None:
    """Near it where it brings a tenth: less is not worth being wrong about."""
    none, *drafting = (rate_of_fixed_depth(sequences, even(p), depth) for depth in range(HEADS + 1))
    best = max(none, *drafting)
    assert rate_of_policy(sequences, even(p)) >= 0.97 * none
    if best >= 1.1 * none:
        assert rate_of_policy(sequences, even(p), warm=200) >= 0.95 * best


@pytest.mark.parametrize("sequences", [1, 4, 16, 32])
def test_heads_that_are_sure_and_wrong_cost_less_than_three_percent(sequences: int) -> None:
    none = rate_of_fixed_depth(sequences, overconfident, 0)
    assert rate_of_policy(sequences, overconfident) >= 0.97 * none


@pytest.mark.parametrize("sequences", [4, 16])
def test_heads_that_know_when_they_are_right_beat_every_fixed_depth(sequences: int) -> None:
    best = max(rate_of_fixed_depth(sequences, calibrated, depth) for depth in range(HEADS + 1))
    assert rate_of_policy(sequences, calibrated) >= 1.05 * best
