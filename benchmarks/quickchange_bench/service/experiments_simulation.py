"""Simulation of the experiments' rules: rates of wrong decisions and time to right ones.

Whole experiments are drawn, each looked at after every `every` outcomes, and the first look at
which a rule speaks ends it. An A/A run's variants are the same: whatever is said there is false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quickchange_server.experiments.statistics.moments import Floats, Kind, Moments, pooled
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.experiments.statistics.ratio import CONCENTRATION, dirichlet_evidence
from quickchange_server.experiments.statistics.sequential import differences, p_value

Bools = NDArray[np.bool_]
Strata = Sequence[Moments]  # a stage each
Rule = Callable[[Strata, Plan], Bools]  # moments of [..., V] to [..., V - 1]: says "different"
_BATCH = 50  # runs drawn at once: bounds memory


@dataclass(frozen=True)
class Population:
    """Distribution of outcomes. `effect` is the shift of a variant's mean."""

    name: str
    kind: Kind
    deviation: float  # standard deviation of an outcome
    draw: Callable[[np.random.Generator, Floats], Floats]  # effects of any shape to outcomes


def normal() -> Population:
    """Normal outcomes: mean 0, standard deviation 1."""
    return Population("normal", "number", 1.0, lambda rng, e: rng.standard_normal(e.shape) + e)


def lognormal(sigma: float) -> Population:
    """Log-normal outcomes: a heavy upper tail, as of latencies and lengths; median 1."""
    deviation = float(stats.lognorm(sigma).std())
    return Population(
        f"lognormal, sigma {sigma:g}",
        "number",
        deviation,
        lambda rng, e: np.exp(sigma * rng.standard_normal(e.shape)) + e,
    )


def flag(rate: float) -> Population:
    """Flag outcomes: 1 with probability `rate`, else 0."""
    return Population(
        f"flag, {100 * rate:g} %",
        "flag",
        float(np.sqrt(rate * (1 - rate))),
        lambda rng, e: (rng.random(e.shape) < rate + e).astype(np.float64),
    )


@dataclass(frozen=True)
class Trial:
    """One kind of run: V variants, their weights, and what the last one has over the others.

    Several stages of weights, equally long, are a ramp; from each to the next, all outcomes move by
    `drift`, as they do from a working day to a Sunday.
    """

    population: Population
    stages: tuple[tuple[float, ...], ...] = ((1.0, 1.0),)
    effect: float = 0.0
    drift: float = 0.0

    @property
    def variants(self) -> int:
        return len(self.stages[0])

    @property
    def smallest(self) -> float:
        """The smallest variant's share of all outcomes."""
        stages = np.array(self.stages)
        return float(np.mean(stages / stages.sum(axis=1, keepdims=True), axis=0).min())

    def stage(self, looks: int) -> NDArray[np.intp]:
        """Stage at each look: [looks]."""
        return np.asarray(np.arange(looks) * len(self.stages) // looks)

    def assign(self, uniform: Floats) -> NDArray[np.intp]:
        """Variant of each outcome, [runs, looks, every], from uniform numbers in [0, 1)."""
        stage = self.stage(uniform.shape[1])
        ends = np.cumsum(self.stages, axis=1) / np.sum(self.stages, axis=1, keepdims=True)
        return np.asarray(
            sum(uniform >= ends[stage, k, None] for k in range(self.variants - 1)), dtype=np.intp
        )


@dataclass(frozen=True)
class Design:
    """Number and length of each trial's runs, and the interval between looks."""

    runs: int = 1000
    horizon: int = 5000  # units of the smallest variant, on average
    every: int = 50  # outcomes, of all variants together, between looks
    seed: int = 0


@dataclass(frozen=True)
class RuleOutcomes:
    """Decisions of a rule in the runs of a trial."""

    share: float  # share of runs with a decision
    wrong: float  # share of runs whose first decision has the wrong sign or is on an equal variant
    median_units: float  # of the smallest variant; infinite where half the runs had no decision


def always_valid(strata: Strata, plan: Plan) -> Bools:
    """The server's always-valid rule."""
    moments = pooled(strata)
    compared = moments.count.shape[-1] - 1
    small = p_value(differences(strata), plan.rho) * compared < plan.alpha
    return np.asarray(plan.enough(moments) & small)


def t_test(strata: Strata, plan: Plan) -> Bools:
    """Welch's t-test at each look with the same minimum sample: invalid under repeated looks."""
    moments = pooled(strata)
    first = (moments.mean[..., :1], np.sqrt(moments.variance[..., :1]), moments.count[..., :1])
    rest = (moments.mean[..., 1:], np.sqrt(moments.variance[..., 1:]), moments.count[..., 1:])
    enough = plan.enough(moments)
    with np.errstate(divide="ignore", invalid="ignore"):  # looks that are not enough yet
        found = stats.ttest_ind_from_stats(*rest, *first, equal_var=False)
    return np.asarray(enough & (found.pvalue * rest[0].shape[-1] < plan.alpha))


def looks(trial: Trial, design: Design) -> Iterator[Strata]:
    """Yield the trial's runs in batches: moments [runs, looks, V] of each stage."""
    rng = np.random.default_rng(design.seed)
    shape = (round(design.horizon / trial.smallest) // design.every, design.every)
    effects = np.zeros(trial.variants)
    effects[-1] = trial.effect
    stage = trial.stage(shape[0])  # [looks]
    for start in range(0, design.runs, _BATCH):
        runs = min(_BATCH, design.runs - start)
        variant = trial.assign(rng.random((runs, *shape)))
        moved = effects[variant] + trial.drift * stage[:, None]
        value = trial.population.draw(rng, moved)
        sums = [
            np.stack([np.sum(part, axis=-1, where=variant == k) for k in range(trial.variants)], -1)
            for part in (np.ones_like(value), value, value**2)
        ]
        yield [
            Moments(
                trial.population.kind,
                *(np.cumsum(part * (stage == k)[:, None], axis=1) for part in sums),
            )
            for k in range(len(trial.stages))
        ]


def judge(trial: Trial, design: Design, plan: Plan, rules: Sequence[Rule]) -> list[RuleOutcomes]:
    """Outcomes of each rule on the same runs."""
    heard: list[list[tuple[float, bool]]] = [[] for _ in rules]
    for strata in looks(trial, design):
        units = pooled(strata).count.min(axis=-1)
        estimates = differences(strata).value
        for rule, spoken in zip(rules, heard, strict=True):
            spoken += _first_words(rule(strata, plan), estimates, units, trial.effect)
    return [_found(spoken) for spoken in heard]


def _first_words(
    said: Bools, estimates: Floats, units: Floats, effect: float
) -> list[tuple[float, bool]]:
    """Per run: the smallest variant's units at the first decision, and True if that was wrong."""
    words = []
    for run in range(len(said)):
        when = np.flatnonzero(said[run].any(axis=-1))
        if not len(when):
            words.append((float("inf"), False))
            continue
        about = np.flatnonzero(said[run, when[0]])
        right = (about == said.shape[-1] - 1) & (estimates[run, when[0], about] * effect > 0)
        words.append((float(units[run, when[0]]), not right.all()))
    return words


def _found(words: Sequence[tuple[float, bool]]) -> RuleOutcomes:
    units = np.array([word[0] for word in words])
    return RuleOutcomes(
        share=float(np.mean(np.isfinite(units))),
        wrong=float(np.mean([word[1] for word in words])),
        median_units=float(np.quantile(units, 0.5, method="higher")),
    )


def fixed_units(trial: Trial, plan: Plan, power: float = 0.8) -> float:
    """Units a variant that one look at the end needs, for this power (normal approximation)."""
    reach = stats.norm.isf(plan.alpha / 2) + stats.norm.ppf(power)
    return float(2 * (reach * trial.population.deviation / trial.effect) ** 2)


def same_trials() -> list[Trial]:
    """A/A: equal shares, four variants, a tenth, a ramp from a hundredth to a half, and the ramp
    while outcomes drift."""
    populations = [normal(), lognormal(1.0), lognormal(1.5), flag(0.5), flag(0.05), flag(0.01)]
    splits = (
        ((1.0, 1.0),),
        ((1.0, 1.0, 1.0, 1.0),),
        ((9.0, 1.0),),
        ((99.0, 1.0), (9.0, 1.0), (3.0, 1.0), (1.0, 1.0)),
    )
    still = [Trial(p, stages) for p in populations for stages in splits]
    return [
        *still,
        Trial(normal(), splits[-1], drift=0.1),
        Trial(flag(0.05), splits[-1], drift=0.02),
    ]


def different_trials() -> list[Trial]:
    """A/B of several effects, in standard deviations for numbers."""
    numbers = [
        Trial(p, effect=size * p.deviation)
        for p in (normal(), lognormal(1.0))
        for size in (0.05, 0.1, 0.2, 0.5)
    ]
    flags = [(0.5, 0.03), (0.5, 0.05), (0.5, 0.1), (0.05, 0.02), (0.05, 0.05), (0.01, 0.01)]
    return [*numbers, *(Trial(flag(rate), effect=more) for rate, more in flags)]


def ratio_alarms(
    promised: Sequence[float],
    actual: Sequence[float],
    design: Design,
    plan: Plan,
    concentration: float = CONCENTRATION,
) -> RuleOutcomes:
    """The sample-ratio test on runs whose units come by `actual`, tested against `promised`."""
    rng = np.random.default_rng(design.seed)
    shares = np.array(promised) / np.sum(promised)
    total = round(design.horizon / shares.min()) // design.every
    blocks = rng.multinomial(design.every, actual, size=(design.runs, total))
    counts = np.cumsum(blocks, axis=1).astype(np.float64)
    alarms = dirichlet_evidence(counts, shares, concentration * shares) > -np.log(
        plan.ratio_threshold
    )
    words = []
    for run in alarms:
        when = np.flatnonzero(run)
        units = (when[0] + 1) * design.every * shares.min() if len(when) else float("inf")
        words.append((units, False))
    return _found(words)


def same_table(design: Design, plan: Plan, trials: Sequence[Trial]) -> Iterator[str]:
    """A markdown table of false positives, a line at a time."""
    yield "| outcome | shares | false positives, always-valid | t-test at every look |"
    yield "|---|---|---|---|"
    for trial in trials:
        ours, theirs = judge(trial, design, plan, [always_valid, t_test])
        drift = f", drifting by {trial.drift:g} a stage" if trial.drift else ""
        shares = " then ".join(":".join(f"{w:g}" for w in stage) for stage in trial.stages)
        yield (
            f"| {trial.population.name}{drift} | {shares} | {100 * ours.share:.1f} % "
            f"| {100 * theirs.share:.1f} % |"
        )


def different_table(design: Design, plan: Plan, trials: Sequence[Trial]) -> Iterator[str]:
    """A markdown table of power and of how soon, a line at a time."""
    yield (
        "| outcome | effect | found | wrong sign | median units of the smallest "
        "| fixed-size t-test, 80 % power |"
    )
    yield "|---|---|---|---|---|---|"
    for trial in trials:
        (ours,) = judge(trial, design, plan, [always_valid])
        median = f"{ours.median_units:,.0f}" if np.isfinite(ours.median_units) else "beyond"
        yield (
            f"| {trial.population.name} | {trial.effect:+.3g} | {100 * ours.share:.1f} % "
            f"| {100 * ours.wrong:.1f} % | {median} | {fixed_units(trial, plan):,.0f} |"
        )


RATIOS: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    ((0.5, 0.5), (0.5, 0.5)),
    ((0.25, 0.25, 0.25, 0.25), (0.25, 0.25, 0.25, 0.25)),
    ((0.9, 0.1), (0.9, 0.1)),
    ((0.5, 0.5), (0.52, 0.48)),
    ((0.5, 0.5), (0.55, 0.45)),
    ((0.25, 0.25, 0.25, 0.25), (0.27, 0.25, 0.25, 0.23)),
    ((0.9, 0.1), (0.92, 0.08)),
)  # promised, actual


def ratio_table(design: Design, plan: Plan) -> Iterator[str]:
    """A markdown table of the sample-ratio test, a line at a time."""
    yield "| promised | actual | alarms | median units of the smallest |"
    yield "|---|---|---|---|"
    for promised, actual in RATIOS:
        found = ratio_alarms(promised, actual, design, plan)
        median = f"{found.median_units:,.0f}" if np.isfinite(found.median_units) else "beyond"
        names = (" : ".join(f"{share:g}" for share in shares) for shares in (promised, actual))
        yield f"| {' | '.join(names)} | {100 * found.share:.1f} % | {median} |"


def report(design: Design) -> Iterator[str]:
    """All three tables of the default plan, a line at a time."""
    plan = Plan()
    yield (
        f"{design.runs:,} runs of {design.horizon:,} units of the smallest variant, a look after "
        f"every {design.every} outcomes, seed {design.seed}; alpha {plan.alpha:g}, sample ratio "
        f"{plan.ratio_threshold:g}; sharpest at {plan.sharpest_at:g} units.\n"
    )
    yield from same_table(design, plan, same_trials())
    yield ""
    yield from different_table(design, plan, different_trials())
    yield ""
    yield from ratio_table(design, plan)
