"""Administration of experiments: /v1/experiments, their state, results and outcomes."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quickchange_server.adapter_registry.composed_terms import weighted_names
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling, Managing, check_own
from quickchange_server.api.error_responses import from_validation
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_experiments import (
    AuditTrail,
    DeletedExperiment,
    ExperimentDocument,
    ExperimentList,
    ExperimentResults,
    MovedAlias,
    RecordedOutcomes,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.errors import ConflictError, InvalidRequestError, QuickchangeError
from quickchange_server.experiments import experiment_records
from quickchange_server.experiments import outcomes as outcome_records
from quickchange_server.experiments.definition import (
    MAX_LISTED,
    MAX_METRICS,
    MAX_SHADOWS,
    MAX_STEPS,
    MAX_TEXT,
    MAX_VARIANTS,
    Allowed,
    Definition,
    Metric,
    RampStep,
    Served,
    Shadow,
    Unit,
    Variant,
    Weights,
)
from quickchange_server.experiments.experiment import Experiment, Pointed
from quickchange_server.experiments.layout import SIZE, shares
from quickchange_server.experiments.promotion import Moved
from quickchange_server.experiments.sums import results_of
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Body, Json, Name
from quickchange_store.index import Index
from quickchange_store.names import check_name

router = APIRouter(route_class=JsonRoute, tags=["experiments"], responses=COMMON_ERRORS)

MAX_OUTCOMES = 1000  # in one request
PRINTABLE = "^[!-~]+$"
AUDITED = 100  # default number of audit entries


class Change(Body):
    """Changes of a definition; fields that aren't given keep their value."""

    version: int | None = Field(None, ge=1, lt=2**63)  # of the experiment that is meant
    description: str | None = Field(None, max_length=MAX_TEXT)
    weights: Weights | None = None  # new weights of the named variants
    variants: list[Variant] | None = Field(None, max_length=MAX_VARIANTS, fail_fast=True)
    allow: Allowed | None = None
    deny: list[Unit] | None = Field(None, max_length=MAX_LISTED, fail_fast=True)
    ramp: list[RampStep] | None = Field(None, max_length=MAX_STEPS, fail_fast=True)
    shadows: list[Shadow] | None = Field(None, max_length=MAX_SHADOWS, fail_fast=True)
    shadow_limit: int | None = Field(None, ge=1, le=64)
    metrics: list[Metric] | None = Field(None, max_length=MAX_METRICS, fail_fast=True)
    alias: Name | None = None

    def apply(self, definition: Definition) -> Definition:
        """The changed definition, validated as a whole."""
        given = self.model_dump(exclude_unset=True, exclude={"version", "weights"})
        content = {**definition.model_dump(), **given}
        if self.weights is not None:
            content["variants"] = _reweighted(content["variants"], self.weights)
        try:
            return Definition.model_validate(content)
        except ValidationError as error:
            raise from_validation(list(error.errors())) from error


class Stop(Body):
    winner: Name | None = None  # the variant that serves everybody; default: the control


class Promote(Body):
    variant: Name


def _check_value(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)):
        raise PydanticCustomError("value", "must be a number, true or false, or a label")
    return value


# A union would report one error per type.
OutcomeValue = Annotated[
    SkipValidation[bool | float | str],
    BeforeValidator(_check_value),
    WithJsonSchema({"type": ["boolean", "number", "string"]}),
]


class OutcomeBody(Body):
    """An outcome reported by the client, for an answer's id or for the assignment's unit."""

    name: Name
    value: OutcomeValue
    completion: str | None = Field(None, max_length=64, pattern=PRINTABLE)
    unit: str | None = Field(None, min_length=1, max_length=512)
    idempotency_key: str | None = Field(None, max_length=128, pattern=PRINTABLE)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.completion is None) == (self.unit is None):
            raise InvalidRequestError(
                "completion: give either completion (an answer's id) or unit (the user, or what "
                "else the experiment sticks to)",
                param="completion",
            )
        return self


def _one_or_several(schema: Json) -> None:
    """Change the schema of `Outcomes` to admit a single outcome as well."""
    several = {key: schema.pop(key) for key in ("type", "properties", "required")}
    several["additionalProperties"] = schema.pop("additionalProperties")
    schema["anyOf"] = [several, several["properties"]["outcomes"]["items"]]


class Outcomes(Body):
    """A list of outcomes; a single one may also be the body itself."""

    model_config = ConfigDict(json_schema_extra=_one_or_several)

    outcomes: list[OutcomeBody] = Field(min_length=1, max_length=MAX_OUTCOMES, fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _one_alone(cls, body: Any) -> Any:
        if isinstance(body, dict) and "outcomes" not in body:
            return {"outcomes": [body]}
        return body


# --- definitions --------------------------------------------------------------------------------


@router.post(
    "/v1/experiments",
    status_code=201,
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404, 409, 413),
)
async def create(body: Definition, services: Injected, caller: Managing) -> Json:
    """Define an experiment; requests may name it as `model` at once."""
    check_own(caller, body.name, "name")
    services.imports.refuse_taken(body.name)
    _refuse_stored(services.store.snapshot(), body.name)
    _check_served(services, caller, body)
    return _shown(await services.experiments.create(body, caller), services)


@router.get("/v1/experiments", response_model=ExperimentList, response_model_exclude_unset=True)
async def list_experiments(services: Injected, caller: Managing) -> Json:
    """List the experiments that the caller may see."""
    there = services.experiments.all
    return {
        "object": "list",
        "data": [_shown(there[name], services) for name in sorted(there) if caller.sees(name)],
    }


@router.get(
    "/v1/experiments/{name:path}/results", response_model=ExperimentResults, responses=errors(404)
)
async def results(name: str, services: Injected, caller: Managing) -> Json:
    """Statistics of the variants so far."""
    experiment = seen(services, caller, name)
    return await results_of(services.database, experiment)


@router.get("/v1/experiments/{name:path}/audit", response_model=AuditTrail, responses=errors(404))
async def audit(
    name: str,
    services: Injected,
    caller: Managing,
    limit: Annotated[int, Query(ge=1, le=1000)] = AUDITED,
) -> Json:
    """Audit trail, newest entry first; a deleted experiment keeps its own."""
    if not caller.sees(check_name(name)):
        raise experiment_records.unknown(name)
    entries = await services.database.read(
        partial(experiment_records.audit, name=name, limit=limit)
    )
    if not entries:
        raise experiment_records.unknown(name)
    return {"object": "list", "data": entries}


@router.get(
    "/v1/experiments/{name:path}",
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def one_experiment(name: str, services: Injected, caller: Managing) -> Json:
    """One experiment: its definition, its state and its current shares."""
    return _shown(seen(services, caller, name), services)


@router.patch(
    "/v1/experiments/{name:path}",
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404, 409, 413),
)
async def update(name: str, body: Change, services: Injected, caller: Managing) -> Json:
    """Change an experiment; only units whose share moved get another variant."""
    before = seen(services, caller, name).definition
    _check_served(services, caller, body.apply(before), before)
    changed = await services.experiments.update(name, caller, body.apply, body.version)
    return _shown(changed, services)


@router.delete(
    "/v1/experiments/{name:path}", response_model=DeletedExperiment, responses=errors(404)
)
async def delete(name: str, services: Injected, caller: Managing) -> Json:
    """Delete an experiment and its records; the audit trail stays."""
    seen(services, caller, name)
    await services.experiments.delete(name, caller)
    return {"id": name, "object": "experiment.deleted", "deleted": True}


# --- state --------------------------------------------------------------------------------------


@router.post(
    "/v1/experiments/{name:path}/pause",
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404, 409),
)
async def pause(name: str, services: Injected, caller: Managing) -> Json:
    """Serve the control to everybody for now, without counting it."""
    seen(services, caller, name)
    return _shown(await services.experiments.pause(name, caller), services)


@router.post(
    "/v1/experiments/{name:path}/resume",
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404, 409),
)
async def resume(name: str, services: Injected, caller: Managing) -> Json:
    """Resume a paused experiment; everybody gets their variant again."""
    seen(services, caller, name)
    return _shown(await services.experiments.resume(name, caller), services)


@router.post(
    "/v1/experiments/{name:path}/stop",
    response_model=ExperimentDocument,
    response_model_exclude_unset=True,
    responses=errors(404, 409, 413),
)
async def stop(name: str, services: Injected, caller: Managing, body: Stop | None = None) -> Json:
    """End an experiment: everybody gets the winner, or the control."""
    seen(services, caller, name)
    winner = None if body is None else body.winner
    return _shown(await services.experiments.stop(name, caller, winner), services)


@router.post(
    "/v1/experiments/{name:path}/promote",
    response_model=MovedAlias,
    responses=errors(404, 409, 413),
)
async def promote(name: str, body: Promote, services: Injected, caller: Managing) -> Json:
    """Point the experiment's alias at what a variant serves, atomically."""
    _check_alias(services, caller, seen(services, caller, name).definition.alias)
    return _moved(name, await services.promotions.promote(name, caller, body.variant))


@router.post(
    "/v1/experiments/{name:path}/rollback", response_model=MovedAlias, responses=errors(404, 409)
)
async def roll_back(name: str, services: Injected, caller: Managing) -> Json:
    """Undo the last promotion: the alias points where it did before."""
    promotions = seen(services, caller, name).promotions
    _check_alias(services, caller, promotions[-1].alias if promotions else None)
    return _moved(name, await services.promotions.roll_back(name, caller))


# --- outcomes -----------------------------------------------------------------------------------


@router.post(
    "/v1/experiments/{name:path}/outcomes",
    status_code=201,
    response_model=RecordedOutcomes,
    responses=errors(404, 409, 413),
)
async def outcomes(name: str, body: Outcomes, services: Injected, caller: Calling) -> Json:
    """Record outcomes of answers, all or none. The response comes after they are durable."""
    experiment = seen(services, caller, name)
    given = [_reported(outcome, index) for index, outcome in enumerate(body.outcomes)]
    now = services.experiments.clock()
    kept = await services.database.write(
        partial(outcome_records.keep, experiment=experiment, caller=caller, outcomes=given, now=now)
    )
    for each in kept:
        if each.new:
            services.experiment_metrics.outcome(name, each.variant, each.name)
    return {"object": "list", "data": [asdict(each) for each in kept]}


def _reported(outcome: OutcomeBody, index: int) -> outcome_records.ReportedOutcome:
    return outcome_records.ReportedOutcome(
        param=f"outcomes[{index}]",
        name=outcome.name,
        value=outcome.value,
        completion=outcome.completion,
        unit=outcome.unit,
        key=outcome.idempotency_key,
    )


# --- views and checks ---------------------------------------------------------------------------


def _shown(experiment: Experiment, services: Services) -> Json:
    now = services.experiments.clock()
    held = shares(experiment.stretches[experiment.stretch(now)].layout)
    names = [variant.name for variant in experiment.definition.variants]
    last = experiment.promotions[-1] if experiment.promotions else None
    return {
        "id": experiment.name,
        "object": "experiment",
        "version": experiment.version,
        "state": experiment.state,
        "created": int(experiment.created),
        "winner": experiment.winner,
        "shares": {name: round(held.get(name, 0) / SIZE, 9) for name in names},
        "promoted": None if last is None else last.variant,
        "definition": experiment.definition.model_dump(mode="json", exclude_none=True),
    }


def _moved(name: str, moved: Moved) -> Json:
    return {
        "id": name,
        "object": "experiment.alias",
        "alias": moved.alias,
        "before": _pointed(moved.before),
        "after": _pointed(moved.after),
        "not_carried": list(moved.not_carried),
    }


def _pointed(pointed: Pointed | None) -> Json | None:
    return None if pointed is None else asdict(pointed)


def seen(services: Services, caller: Caller, name: str) -> Experiment:
    """The experiment. Raises UnknownModelError if there is none or the caller can't see it."""
    found = services.experiments.find(name) if caller.sees(name) else None
    if found is None:
        raise experiment_records.unknown(name, filter(caller.sees, services.experiments.all))
    return found


def _refuse_stored(index: Index, name: str) -> None:
    taken = "an adapter" if name in index.entries else "an alias" if name in index.aliases else None
    if taken is not None:
        raise ConflictError(
            f"name: {name!r} is {taken}; choose another name for the experiment", param="name"
        )


def _check_alias(services: Services, caller: Caller, alias: str | None) -> None:
    if alias is not None:
        check_own(caller, alias, "alias")
        services.imports.refuse_taken(alias)


def _check_served(
    services: Services, caller: Caller, definition: Definition, before: Definition | None = None
) -> None:
    """Raise for a variant or shadow that can't be served, with its place in the body.

    Variants unchanged since `before` are not checked: the weight of one whose adapter is gone, or
    that the caller can't see, can still be taken away.
    """
    old = () if before is None else (*before.variants, *before.shadows)
    there = {each.name: each for each in old}
    for field in ("variants", "shadows"):
        variants: list[Served] = getattr(definition, field)
        for index, variant in enumerate(variants):
            known = there.get(variant.name)
            if known is None or not known.serves_as(variant):
                _check_one(services, caller, variant, f"{field}[{index}]")


def _check_one(services: Services, caller: Caller, variant: Served, place: str) -> None:
    model = variant.model or services.catalog.base_name
    composition = weighted_names(variant.adapters)
    turbo = "auto" if variant.turbo is None else variant.turbo
    try:
        services.catalog.select(model, composition, turbo, sees=caller.sees, tenant=caller.tenant)
    except QuickchangeError as error:
        raise type(error)(f"{place}.{error.message}", param=f"{place}.{error.param}") from error


def _reweighted(variants: list[Json], weights: dict[str, float]) -> list[Json]:
    known = {variant["name"] for variant in variants}
    for name in weights:
        if name not in known:
            raise InvalidRequestError(
                f"weights: there is no variant {name!r}; there are {', '.join(sorted(known))}",
                param="weights",
            )
    return [{**v, "weight": weights.get(v["name"], v["weight"])} for v in variants]
