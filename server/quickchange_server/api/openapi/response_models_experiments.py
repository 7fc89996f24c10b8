"""Response models of the routes for experiments; docs/http.md says what the fields mean."""

from __future__ import annotations

from typing import Any, Literal

from quickchange_server.api.openapi.response_models import ExperimentState, ResponseModel
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.statistics.result_types import (
    Method,
    OutcomeResult,
    RatioResult,
)


class ExperimentDocument(ResponseModel):
    id: str
    object: Literal["experiment"]
    version: int
    state: ExperimentState
    created: int
    winner: str | None
    shares: dict[str, float]  # current
    promoted: str | None
    definition: Definition


class ExperimentList(ResponseModel):
    object: Literal["list"]
    data: list[ExperimentDocument]


class ExportedRewrite(ResponseModel):
    object: Literal["experiment.rewrite"]
    rewrite: dict[str, Any]  # an InferenceModelRewrite
    left_out: list[str]


class ImportedRewrite(ExperimentList):
    left_out: list[str]


class DeletedExperiment(ResponseModel):
    id: str
    object: Literal["experiment.deleted"]
    deleted: Literal[True]


class AliasTarget(ResponseModel):
    target: str
    turbo: str | None


class MovedAlias(ResponseModel):
    id: str
    object: Literal["experiment.alias"]
    alias: str
    before: AliasTarget | None
    after: AliasTarget | None
    not_carried: list[str]


class RecordedOutcome(ResponseModel):
    name: str
    variant: str
    counted: bool
    new: bool


class RecordedOutcomes(ResponseModel):
    object: Literal["list"]
    data: list[RecordedOutcome]


class AuditEntry(ResponseModel):
    id: int
    experiment: str
    name: str
    at: float
    tenant: str
    key: str | None
    action: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditTrail(ResponseModel):
    object: Literal["list"]
    data: list[AuditEntry]


class ShadowMeasure(ResponseModel):
    count: int
    mean: float | None


class ExperimentResults(ResponseModel):
    """Statistics so far; docs/experiments-statistics.md says how to read them."""

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
