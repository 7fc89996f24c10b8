"""What the experiments' routes answer, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from quickchange_server.api.openapi.response_models import Answer, ExperimentState
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.statistics.result_types import (
    Method,
    OutcomeResult,
    RatioResult,
)


class Experiment(Answer):
    id: str
    object: Literal["experiment"]
    version: int
    state: ExperimentState
    created: int
    winner: str | None
    shares: dict[str, float]  # that hold now
    promoted: str | None
    definition: Definition


class Experiments(Answer):
    object: Literal["list"]
    data: list[Experiment]


class DeletedExperiment(Answer):
    id: str
    object: Literal["experiment.deleted"]
    deleted: Literal[True]


class AliasTarget(Answer):
    target: str
    turbo: str | None


class MovedAlias(Answer):
    id: str
    object: Literal["experiment.alias"]
    alias: str
    before: AliasTarget | None
    after: AliasTarget | None
    not_carried: list[str]


class KeptOutcome(Answer):
    name: str
    variant: str
    counted: bool
    new: bool


class KeptOutcomes(Answer):
    object: Literal["list"]
    data: list[KeptOutcome]


class AuditEntry(Answer):
    id: int
    experiment: str
    name: str
    at: float
    tenant: str
    key: str | None
    action: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditTrail(Answer):
    object: Literal["list"]
    data: list[AuditEntry]


class ShadowMeasure(Answer):
    count: int
    mean: float | None


class Results(Answer):
    """docs/experiments-statistics.md says how to read it."""

    id: str
    object: Literal["experiment.results"]
    version: int
    state: ExperimentState
    control: str
    minimum: int
    alpha: float
    minimum_events: int
    method: Method
    ratio: RatioResult
    outcomes: list[OutcomeResult]
    automatic: list[OutcomeResult]
    requests: dict[str, dict[str, int]]
    shadows: dict[str, dict[str, ShadowMeasure]]
