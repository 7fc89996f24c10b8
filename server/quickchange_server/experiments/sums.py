"""Results of an experiment: sufficient statistics by SQL, given to the statistical analysis.

Each unit counts once, with the mean of its outcomes. A unit is the subject that the assignment
sticks to, or one request if it has none. It belongs to the variant that it got first; what it does
after a change of weights moved it to another is left out. Only random assignments count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, Subquery, and_, case, func, null, select

from quickchange_server.experiments.definition import Metric
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.layout import shares
from quickchange_server.experiments.statistics.analysis import (
    OutcomeSums,
    StretchUnits,
    Sums,
    analyse,
)
from quickchange_server.experiments.statistics.best import Goal
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables_experiments import EXPERIMENT_EXPOSURES, EXPERIMENT_OUTCOMES

MAX_LABELS = 20  # the most frequent labels of an outcome
ENDINGS: Mapping[str, Goal] = {
    "stop": "increase",
    "length": "decrease",
    "cancelled": "decrease",
    "failed": "decrease",
}
GOALS: Mapping[str, Goal] = {**ENDINGS, "accepted_per_step": "increase"}  # of others: decrease
NOTHING = Sums(0, 0.0, 0.0)

_E, _O = EXPERIMENT_EXPOSURES.c, EXPERIMENT_OUTCOMES.c
Found = dict[tuple[str, int], list[Sums]]  # sums of each value, by variant and stretch


@dataclass(frozen=True, slots=True)
class ExperimentSums:
    """All data for the analysis. Sequences over variants are in `order`."""

    order: tuple[str, ...]  # the variants, control first
    outcomes: tuple[OutcomeSums, ...]  # reported by clients
    automatic: tuple[OutcomeSums, ...]  # measured by the server
    shadows: Mapping[str, Mapping[str, Sums]]  # by variant and measure
    requests: Mapping[str, Mapping[str, int]]  # number of requests by variant and ending
    stretches: tuple[StretchUnits, ...]


async def results_of(database: Database, experiment: Experiment) -> dict[str, Any]:
    """The results now, as JSON. The SQL and the analysis run on threads."""
    sums = await database.read(partial(tally, experiment=experiment))
    return await asyncio.to_thread(_results, experiment, sums)


def _results(experiment: Experiment, sums: ExperimentSums) -> dict[str, Any]:
    reported = len(sums.outcomes)
    analysed = analyse(
        sums.order, [*sums.outcomes, *sums.automatic], sums.stretches, plan_of(experiment)
    ).to_json()
    every = analysed.pop("outcomes")
    return {
        "id": experiment.name,
        "object": "experiment.results",
        "version": experiment.version,
        "state": experiment.state,
        "control": sums.order[0],
        "minimum": experiment.definition.minimum,
        **analysed,
        "outcomes": every[:reported],
        "automatic": every[reported:],
        "requests": sums.requests,
        "shadows": {
            variant: {
                name: {"count": s.count, "mean": s.total / s.count if s.count else None}
                for name, s in measures.items()
            }
            for variant, measures in sums.shadows.items()
        },
    }


def plan_of(experiment: Experiment) -> Plan:
    """The analysis plan, which an experiment's definition fixes from the start."""
    minimum = experiment.definition.minimum
    uneven = max(minimum, Plan().minimum_units_uneven)
    return Plan(
        alpha=experiment.definition.alpha, minimum_units=minimum, minimum_units_uneven=uneven
    )


def tally(connection: Connection, experiment: Experiment) -> ExperimentSums:
    """Query the current sums."""
    definition = experiment.definition
    control = definition.default.name
    order = (control, *(v.name for v in definition.variants if v.name != control))
    return ExperimentSums(
        order=order,
        outcomes=tuple(
            each
            for metric in definition.metrics
            for each in _reported(connection, experiment, metric, order)
        ),
        automatic=_automatic(connection, experiment, order),
        shadows=_shadowed(connection, experiment),
        requests=_requests(connection, experiment),
        stretches=_stretches(connection, experiment, order),
    )


# --- outcomes reported by clients ---------------------------------------------------------------


def _reported(
    connection: Connection, experiment: Experiment, metric: Metric, order: Sequence[str]
) -> Iterable[OutcomeSums]:
    def summed(value: ColumnElement[Any]) -> list[list[Sums]]:
        means = _unit_means(experiment, metric, value)
        found = _summed(connection, means, [means.c.mean])
        return _placed(found, experiment, order, 0)

    kind, goal, margin = metric.kind, metric.goal, metric.margin
    if kind != "label":
        yield OutcomeSums(metric.name, kind, summed(_O.value), goal, margin)
        return
    labels = _labels(connection, experiment, metric)
    for label in labels:
        has = case((_O.label == label, 1.0), else_=0.0)
        yield OutcomeSums(metric.name, kind, summed(has), goal, margin, label, len(labels))


def _labels(connection: Connection, experiment: Experiment, metric: Metric) -> list[str]:
    query = (
        select(_O.label)
        .where(*_outcomes_of(experiment, metric))
        .group_by(_O.label)
        .order_by(func.count().desc(), _O.label)
        .limit(MAX_LABELS)
    )
    return sorted(str(label) for label in connection.execute(query).scalars())


def _outcomes_of(experiment: Experiment, metric: Metric) -> list[ColumnElement[bool]]:
    # A metric's name may have been reused with another kind; outcomes of that kind are left out.
    kinds = {
        "number": _O.value.is_not(None),
        "flag": _O.value.in_((0.0, 1.0)),
        "label": _O.label.is_not(None),
    }
    of_metric = _O.experiment == experiment.id, _O.name == metric.name, _O.counted.is_(True)
    return [*of_metric, kinds[metric.kind]]


def _unit_means(experiment: Experiment, metric: Metric, value: ColumnElement[Any]) -> Subquery:
    """One row for each unit: variant, stretch, mean."""
    means = (
        select(_O.variant, _O.unit, func.avg(value).label("mean"))
        .where(*_outcomes_of(experiment, metric))
        .group_by(_O.variant, _O.unit)
        .subquery()
    )
    first = _first_seen(experiment)
    same = _same_unit(first, means)
    if metric.missing is None:
        mean = means.c.mean
        joined = first.join(means, same)
    else:
        mean = func.coalesce(means.c.mean, float(metric.missing), type_=Float).label("mean")
        joined = first.outerjoin(means, same)
    return select(first.c.variant, first.c.stretch, mean).select_from(joined).subquery()


# --- measurements by the server -----------------------------------------------------------------


def _counted(experiment: Experiment, *, shadow: bool = False) -> list[ColumnElement[bool]]:
    return [_E.experiment == experiment.id, _E.counted.is_(True), _E.shadow.is_(shadow)]


def _measures() -> dict[str, ColumnElement[Any]]:
    answered = _E.ending.in_(("stop", "length"))
    return {
        "latency": case((answered, _E.seconds), else_=null()),
        "first_token": _E.first_token,
        "tokens": case((answered, _E.tokens * 1.0), else_=null()),
        # each step gives a token besides the drafts that it accepts; choices are summed, as steps
        "accepted_per_step": case(
            (
                and_(answered, _E.tokens > _E.accepted),
                _E.accepted * 1.0 / (_E.tokens - _E.accepted),
            ),
            else_=null(),
        ),
        **{ending: case((_E.ending == ending, 1.0), else_=0.0) for ending in ENDINGS},
    }


def _automatic(
    connection: Connection, experiment: Experiment, order: Sequence[str]
) -> tuple[OutcomeSums, ...]:
    found = _measured(connection, experiment)
    return tuple(
        OutcomeSums(
            name,
            "flag" if name in ENDINGS else "number",
            _placed(found, experiment, order, place),
            GOALS.get(name, "decrease"),
            least=0.0,  # seconds and tokens
        )
        for place, name in enumerate(_measures())
    )


def _measured(connection: Connection, experiment: Experiment) -> Found:
    """The sums of all measures, in the order of `_measures`."""
    measures = [value.label(name) for name, value in _measures().items()]
    averages = [func.avg(value).label(value.name) for value in measures]
    means = (
        select(_E.variant, _E.unit, *averages)
        .where(*_counted(experiment))
        .group_by(_E.variant, _E.unit)
        .subquery()
    )
    first = _first_seen(experiment)
    columns = [means.c[value.name] for value in measures]
    joined = first.join(means, _same_unit(first, means))
    placed = select(first.c.variant, first.c.stretch, *columns).select_from(joined).subquery()
    return _summed(connection, placed, [placed.c[value.name] for value in measures])


def _shadowed(connection: Connection, experiment: Experiment) -> dict[str, dict[str, Sums]]:
    """Sums over requests, not units: nothing is inferred from them."""
    measures = _measures()
    query = (
        select(_E.variant, *_three(measures.values()))
        .where(*_counted(experiment, shadow=True))
        .group_by(_E.variant)
    )
    return {
        row[0]: dict(zip(measures, _read(row[1:]), strict=True))
        for row in connection.execute(query)
    }


# --- sums ---------------------------------------------------------------------------------------


def _summed(connection: Connection, units: Subquery, values: Sequence[ColumnElement[Any]]) -> Found:
    key = units.c.variant, units.c.stretch
    query = select(*key, *_three(values)).group_by(*key)
    return {(row[0], row[1]): _read(row[2:]) for row in connection.execute(query)}


def _three(values: Iterable[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    """Count, sum and sum of squares of each value."""
    return [f for v in values for f in (func.count(v), func.sum(v), func.sum(v * v))]


def _read(columns: Sequence[Any]) -> list[Sums]:
    return [
        Sums(count, float(total or 0.0), float(squares or 0.0))
        for count, total, squares in zip(*[iter(columns)] * 3, strict=True)
    ]


def _placed(
    found: Found, experiment: Experiment, order: Sequence[str], place: int
) -> list[list[Sums]]:
    """The sums of one value, [stretch][variant]."""
    return [
        [
            found[variant, number][place] if (variant, number) in found else NOTHING
            for variant in order
        ]
        for number in range(len(experiment.stretches))
    ]


# --- units and requests -------------------------------------------------------------------------


def _requests(connection: Connection, experiment: Experiment) -> dict[str, dict[str, int]]:
    query = (
        select(_E.variant, _E.ending, func.count())
        .where(_E.experiment == experiment.id)
        .group_by(_E.variant, _E.ending)
    )
    found: dict[str, dict[str, int]] = {}
    for variant, ending, count in connection.execute(query):
        found.setdefault(variant, {})[ending] = count
    return found


def _first_seen(experiment: Experiment) -> Subquery:
    """Unit, variant and stretch of each unit's first exposure, which decides its variant."""
    nth = func.row_number().over(partition_by=_E.unit, order_by=(_E.stretch, _E.at, _E.completion))
    seen = (
        select(_E.unit, _E.variant, _E.stretch, nth.label("nth"))
        .where(*_counted(experiment))
        .subquery()
    )
    return select(seen.c.unit, seen.c.variant, seen.c.stretch).where(seen.c.nth == 1).subquery()


def _same_unit(first: Subquery, means: Subquery) -> ColumnElement[bool]:
    """Join condition for a unit's outcomes under its first variant."""
    return and_(first.c.unit == means.c.unit, first.c.variant == means.c.variant)


def _stretches(
    connection: Connection, experiment: Experiment, order: Sequence[str]
) -> tuple[StretchUnits, ...]:
    """Units of each variant, by the stretch of their first exposure."""
    first = _first_seen(experiment)
    key = first.c.stretch, first.c.variant
    query = select(*key, func.count()).group_by(*key)
    counts = {(row[0], row[1]): int(row[2]) for row in connection.execute(query)}
    return tuple(
        StretchUnits(
            [float(shares(stretch.layout).get(variant, 0)) for variant in order],
            [counts.get((number, variant), 0) for variant in order],
        )
        for number, stretch in enumerate(experiment.stretches)
    )
