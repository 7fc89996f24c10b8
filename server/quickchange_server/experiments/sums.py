"""Sufficient statistics of an experiment, by SQL: each unit counts once, with its mean.

A unit is what the assignment sticks to, or one request where nothing sticks. Only assignments that
were left to chance count. Knows nothing of inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    FromClause,
    Select,
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
from quickchange_server.experiments.statistics.analysis import OutcomeSums, Stretch, Sums
from quickchange_server.experiments.statistics.best import Goal
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
    stretches: tuple[Stretch, ...]


def tally(connection: Connection, experiment: Experiment) -> Tally:
    """The sums as they are now."""
    definition = experiment.definition
    control = definition.default.name
    order = (control, *(v.name for v in definition.variants if v.name != control))
    return Tally(
        order=order,
        outcomes=tuple(
            each for metric in definition.metrics for each in _told(connection, experiment, metric, order)
        ),
        automatic=_automatic(connection, experiment, order),
        shadows=_measured(connection, experiment, shadow=True),
        requests=_requests(connection, experiment),
        stretches=_stretches(connection, experiment, order),
    )


# --- what clients told --------------------------------------------------------------------------


def _told(
    connection: Connection, experiment: Experiment, metric: Metric, order: Sequence[str]
) -> Iterable[OutcomeSums]:
    if metric.kind != "label":
        found = _summed(connection, _unit_means(experiment, metric, _O.value))
        yield OutcomeSums(metric.name, metric.kind, _in(order, found), metric.goal, metric.margin)
        return
    labels = _labels(connection, experiment, metric)
    for label in labels:
        has = case((_O.label == label, 1.0), else_=0.0)
        found = _summed(connection, _unit_means(experiment, metric, has))
        yield OutcomeSums(
            metric.name,
            "label",
            _in(order, found),
            metric.goal,
            metric.margin,
            label,
            len(labels),
        )


def _labels(connection: Connection, experiment: Experiment, metric: Metric) -> list[str]:
    query = (
        select(_O.label)
        .where(*_outcomes_of(experiment, metric), _O.label.is_not(None))
        .group_by(_O.label)
        .order_by(func.count().desc(), _O.label)
        .limit(MAX_LABELS)
    )
    return sorted(str(label) for label in connection.execute(query).scalars())


def _outcomes_of(experiment: Experiment, metric: Metric) -> list[ColumnElement[bool]]:
    return [_O.experiment == experiment.id, _O.name == metric.name, _O.counted.is_(True)]


def _unit_means(
    experiment: Experiment, metric: Metric, value: ColumnElement[Any]
) -> Subquery:
    """(variant, mean) a unit."""
    means = (
        select(_O.variant, _O.unit, func.avg(value).label("mean"))
        .where(*_outcomes_of(experiment, metric))
        .group_by(_O.variant, _O.unit)
        .subquery()
    )
    if metric.missing is None:
        return means
    units = select(_E.variant, _E.unit).where(*_counted(experiment)).distinct().subquery()
    same = and_(units.c.variant == means.c.variant, units.c.unit == means.c.unit)
    filled = func.coalesce(means.c.mean, float(metric.missing), type_=Float)
    joined = units.outerjoin(means, same)
    return select(units.c.variant, filled.label("mean")).select_from(joined).subquery()


def _summed(connection: Connection, means: FromClause) -> dict[str, Sums]:
    mean = means.c.mean
    query = select(
        means.c.variant, func.count(mean), func.sum(mean), func.sum(mean * mean)
    ).group_by(means.c.variant)
    return {row[0]: _sums(*row[1:]) for row in connection.execute(query)}


def _sums(count: int, total: Any, squares: Any) -> Sums:
    return Sums(count, float(total or 0.0), float(squares or 0.0))


def _in(order: Sequence[str], found: Mapping[str, Sums]) -> tuple[Sums, ...]:
    return tuple(found.get(variant, NOTHING) for variant in order)


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
            tuple(found.get(variant, {}).get(name, NOTHING) for variant in order),
            ENDINGS.get(name, "decrease"),
        )
        for name in _measures()
    )


def _measured(
    connection: Connection, experiment: Experiment, *, shadow: bool = False
) -> dict[str, dict[str, Sums]]:
    measures = _measures()
    means = (
        select(_E.variant, *(func.avg(value).label(name) for name, value in measures.items()))
        .where(*_counted(experiment, shadow=shadow))
        .group_by(_E.variant, _E.unit)
        .subquery()
    )
    columns = [means.c[name] for name in measures]
    sums = [f for c in columns for f in (func.count(c), func.sum(c), func.sum(c * c))]
    query = select(means.c.variant, *sums).group_by(means.c.variant)
    return {
        row[0]: {name: _sums(*row[1 + 3 * k : 4 + 3 * k]) for k, name in enumerate(measures)}
        for row in connection.execute(query)
    }


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


def _stretches(
    connection: Connection, experiment: Experiment, order: Sequence[str]
) -> tuple[Stretch, ...]:
    """Units of each variant by the stretch in which they were first seen."""
    counts = {
        (number, variant): count
        for number, variant, count in connection.execute(_first_seen(experiment))
    }
    sizes = [shares(stretch.layout) for stretch in experiment.stretches]
    return tuple(
        Stretch(
            [float(size.get(variant, 0)) for variant in order],
            [counts.get((number, variant), 0) for variant in order],
        )
        for number, size in enumerate(sizes)
    )


def _first_seen(experiment: Experiment) -> Select[tuple[int, str, int]]:
    nth = func.row_number().over(partition_by=_E.unit, order_by=(_E.at, _E.completion))
    seen = (
        select(_E.stretch, _E.variant, nth.label("nth")).where(*_counted(experiment)).subquery()
    )
    return (
        select(seen.c.stretch, seen.c.variant, func.count())
        .where(seen.c.nth == 1)
        .group_by(seen.c.stretch, seen.c.variant)
    )
