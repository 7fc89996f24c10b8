"""Sufficient statistics of an experiment, by SQL: each unit counts once, with its mean.

A unit is what the assignment sticks to, or one request where nothing sticks. It belongs to the
variant that it got first; what it does after a change of weights moved it to another is left out.
Only assignments that were left to chance count. Knows nothing of inference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    Subquery,
    and_,
    case,
    func,
    null,
    select,
)

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

MAX_LABELS = 20  # of one outcome, the most frequent
ENDINGS: Mapping[str, Goal] = {
    "stop": "increase",
    "length": "decrease",
    "cancelled": "decrease",
    "failed": "decrease",
}
NOTHING = Sums(0, 0.0, 0.0)

_E, _O = EXPERIMENT_EXPOSURES.c, EXPERIMENT_OUTCOMES.c


@dataclass(frozen=True, slots=True)
class Tally:
    """All that the inference needs. Variants stand as in `order`."""

    order: tuple[str, ...]  # of the variants, the control first
    outcomes: tuple[OutcomeSums, ...]
    automatic: tuple[OutcomeSums, ...]  # what the server measured
    shadows: Mapping[str, Mapping[str, Sums]]  # by variant and measure
    requests: Mapping[str, Mapping[str, int]]  # by variant and ending, all that it answered
    stretches: tuple[StretchUnits, ...]


def tally(connection: Connection, experiment: Experiment) -> Tally:
    """The sums as they are now."""
    definition = experiment.definition
    control = definition.default.name
    order = (control, *(v.name for v in definition.variants if v.name != control))
    return Tally(
        order=order,
        outcomes=tuple(
            each
            for metric in definition.metrics
            for each in _told(connection, experiment, metric, order)
        ),
        automatic=_automatic(connection, experiment, order),
        shadows=_shadowed(connection, experiment),
        requests=_requests(connection, experiment),
        stretches=_stretches(connection, experiment, order),
    )


# --- what clients told --------------------------------------------------------------------------


def _told(
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
    kinds = {  # outcomes of a metric of this name that was taken away and came back as another
        "number": _O.value.is_not(None),
        "flag": _O.value.in_((0.0, 1.0)),
        "label": _O.label.is_not(None),
    }
    of_metric = _O.experiment == experiment.id, _O.name == metric.name, _O.counted.is_(True)
    return [*of_metric, kinds[metric.kind]]


def _unit_means(experiment: Experiment, metric: Metric, value: ColumnElement[Any]) -> Subquery:
    """(variant, stretch, mean) a unit."""
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


# --- what the server measured -------------------------------------------------------------------


def _counted(experiment: Experiment, *, shadow: bool = False) -> list[ColumnElement[bool]]:
    return [_E.experiment == experiment.id, _E.counted.is_(True), _E.shadow.is_(shadow)]


def _measures() -> dict[str, ColumnElement[Any]]:
    answered = _E.ending.in_(("stop", "length"))
    return {
        "latency": case((answered, _E.seconds), else_=null()),
        "first_token": _E.first_token,
        "tokens": case((answered, _E.tokens * 1.0), else_=null()),
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
            ENDINGS.get(name, "decrease"),
        )
        for place, name in enumerate(_measures())
    )


def _measured(connection: Connection, experiment: Experiment) -> Found:
    """The sums of all measures, in their order."""
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
    """Of requests, not of units: nothing is inferred from them."""
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

Found = dict[tuple[str, int], list[Sums]]  # by variant and stretch, a value each


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
    """(unit, variant, stretch) of a unit's first exposure: it belongs to that variant for good."""
    nth = func.row_number().over(partition_by=_E.unit, order_by=(_E.stretch, _E.at, _E.completion))
    seen = (
        select(_E.unit, _E.variant, _E.stretch, nth.label("nth"))
        .where(*_counted(experiment))
        .subquery()
    )
    return select(seen.c.unit, seen.c.variant, seen.c.stretch).where(seen.c.nth == 1).subquery()


def _same_unit(first: Subquery, means: Subquery) -> ColumnElement[bool]:
    """Joins what a unit did under the variant that it got first."""
    return and_(first.c.unit == means.c.unit, first.c.variant == means.c.variant)


def _stretches(
    connection: Connection, experiment: Experiment, order: Sequence[str]
) -> tuple[StretchUnits, ...]:
    """Units of each variant by the stretch in which they were first seen."""
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


async def results_of(database: Database, experiment: Experiment) -> dict[str, Any]:
    """The results now. Neither the sums nor the inference hold up the event loop."""
    sums = await database.read(partial(tally, experiment=experiment))
    return await asyncio.to_thread(_results, experiment, sums)


def _results(experiment: Experiment, sums: Tally) -> dict[str, Any]:
    told = len(sums.outcomes)
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
        "outcomes": every[:told],
        "automatic": every[told:],
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
    """What the definition holds fixed from the start."""
    minimum = experiment.definition.minimum
    uneven = max(minimum, Plan().minimum_units_uneven)
    return Plan(
        alpha=experiment.definition.alpha, minimum_units=minimum, minimum_units_uneven=uneven
    )
