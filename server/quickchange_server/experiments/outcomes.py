"""Outcomes that clients report, recorded with the variant that produced them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from quickchange_server.errors import InvalidRequestError, UnknownModelError
from quickchange_server.experiments.assignment import unit_of
from quickchange_server.experiments.definition import LABELS, MAX_NUMBER, Metric, is_label
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.frontend.caller import Caller
from quickchange_server.storage.tables import insert
from quickchange_server.storage.tables_experiments import EXPERIMENT_EXPOSURES, EXPERIMENT_OUTCOMES

Value = float | bool | str


@dataclass(frozen=True, slots=True)
class ReportedOutcome:
    """An outcome as reported by a client, for a completion or for a unit."""

    param: str  # its place in the request, for error messages
    name: str
    value: Value
    completion: str | None
    unit: str | None  # the subject as requests send it, not hashed
    key: str | None  # idempotency key


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """An outcome as stored."""

    name: str
    variant: str
    counted: bool  # the assignment was random
    new: bool  # its idempotency key was unused


@dataclass(frozen=True, slots=True)
class _Exposure:
    variant: str
    unit: str
    counted: bool


def keep(
    connection: Connection,
    experiment: Experiment,
    caller: Caller,
    outcomes: Sequence[ReportedOutcome],
    now: float,
) -> list[StoredOutcome]:
    """Record outcomes, each with the variant of its exposure. `now`: Unix seconds.

    Raises UnknownModelError if a completion or a unit is not the experiment's or the caller's, and
    InvalidRequestError for a value that is not of its metric's kind; the caller's transaction then
    records none.
    """
    return [_keep(connection, experiment, caller, outcome, now) for outcome in outcomes]


def _keep(
    connection: Connection,
    experiment: Experiment,
    caller: Caller,
    outcome: ReportedOutcome,
    now: float,
) -> StoredOutcome:
    metric = _metric(experiment, outcome)
    value, label = _checked(metric, outcome)
    exposure = _exposure(connection, experiment, caller, outcome)
    statement = insert(connection, EXPERIMENT_OUTCOMES).values(
        experiment=experiment.id,
        name=outcome.name,
        variant=exposure.variant,
        unit=exposure.unit,
        completion=outcome.completion,
        counted=exposure.counted,
        value=value,
        label=label,
        at=now,
        tenant=caller.tenant,
        idempotency_key=outcome.key,
    )
    made = statement.on_conflict_do_nothing().returning(EXPERIMENT_OUTCOMES.c.id)
    new = connection.execute(made).first() is not None
    return StoredOutcome(outcome.name, exposure.variant, exposure.counted, new)


def _metric(experiment: Experiment, outcome: ReportedOutcome) -> Metric:
    for metric in experiment.definition.metrics:
        if metric.name == outcome.name:
            return metric
    known = ", ".join(metric.name for metric in experiment.definition.metrics) or "none"
    raise InvalidRequestError(
        f"{outcome.param}.name: the experiment {experiment.name!r} has no metric "
        f"{outcome.name!r}, it has {known}; PATCH its metrics first",
        param=f"{outcome.param}.name",
    )


def _checked(metric: Metric, outcome: ReportedOutcome) -> tuple[float | None, str | None]:
    """(value, None), or (None, label) for a label metric."""
    match metric.kind, outcome.value:
        case "label", str(label) if is_label(label):
            return None, label
        case "flag", bool(flag):
            return float(flag), None
        case "number", float() | int() as number if not isinstance(number, bool):
            if -MAX_NUMBER <= number <= MAX_NUMBER:  # no NaN, and compares any integer
                return float(number), None
    number_wanted = f"a number of at most {MAX_NUMBER:g} either way"
    wanted = {"label": LABELS, "flag": "true or false", "number": number_wanted}
    raise InvalidRequestError(
        f"{outcome.param}.value: {metric.name!r} is a {metric.kind}; send {wanted[metric.kind]}",
        param=f"{outcome.param}.value",
    )


def _exposure(
    connection: Connection, experiment: Experiment, caller: Caller, outcome: ReportedOutcome
) -> _Exposure:
    """The exposure of the completion, or the unit's last one that was not refused."""
    table = EXPERIMENT_EXPOSURES
    query = select(table.c.variant, table.c.unit, table.c.counted).where(
        table.c.experiment == experiment.id,
        table.c.shadow.is_(False),
        table.c.ending != "refused",
    )
    if outcome.completion is not None:
        query = query.where(table.c.completion == outcome.completion)
        if not caller.may("admin"):
            query = query.where(table.c.tenant == caller.tenant)
    else:
        unit = unit_of(experiment.id, caller.tenant, outcome.unit or "")
        query = query.where(table.c.unit == unit).order_by(table.c.at.desc()).limit(1)
    found = connection.execute(query).first()
    if found is None:
        what, given = (
            ("completion", outcome.completion) if outcome.unit is None else ("unit", outcome.unit)
        )
        raise UnknownModelError(
            f"{outcome.param}.{what}: the experiment {experiment.name!r} answered no {what} "
            f"{given!r}",
            param=f"{outcome.param}.{what}",
        )
    return _Exposure(found.variant, found.unit, found.counted)
