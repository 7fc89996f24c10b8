"""Definition of an experiment, as its owner writes it: variants, stickiness, ramp, metrics.

Frozen and validated once; a bad value raises with the field's name. The experiment's later state
(`experiment.py`) and the assignment (`assignment.py`) are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.request_base import (
    SAMPLING,
    Adapters,
    Body,
    Name,
    Number,
    SamplingBody,
    check_length,
)
from quickchange_store.names import check_name

MAX_VARIANTS = 16
MAX_SHADOWS = 4
MAX_STEPS = 64
MAX_METRICS = 32
MAX_LISTED = 10_000
MAX_NUMBER = 1e15  # largest absolute value of an outcome, so that sums of squares don't overflow
MAX_SECONDS = 1e11  # of a time, as for keys
MAX_TEXT = 512  # characters of a description or of a listed unit
AUTOMATIC = (
    *("latency", "first_token", "tokens", "accepted_per_step"),
    *("stop", "length", "cancelled", "failed"),
)
ACTIONS = frozenset(
    {"outcomes", "results", "audit", "pause", "resume", "stop", "promote", "rollback"}
)
# Sampling fields that a variant can't override.
REQUESTS_OWN = frozenset(
    {"n", "seed", "min_tokens", "stop_token_ids", "logit_bias", "logprobs", "prompt_logprobs"}
    | {"logprob_token_ids", "allowed_token_ids", "bad_words"}
    | {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
)
OVERRIDABLE = tuple(name for name in SAMPLING if name not in REQUESTS_OWN)

LABELS = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_label(value: str) -> bool:
    """True if `value` can name a variant or a metric, which appear in headers and metrics."""
    return _LABEL.fullmatch(value) is not None


def _check_label(value: str) -> str:
    if not is_label(value):
        raise PydanticCustomError("label", f"must be {LABELS}")
    return value


def check_experiment_name(name: str) -> str:
    """Check an experiment's name: an adapter's syntax, and no route's action as last segment."""
    check_name(name)
    if name.rpartition("/")[2] in ACTIONS:
        raise PydanticCustomError(
            "experiment_name", "its last segment is the name of a route; choose another"
        )
    return name


Label = Annotated[str, AfterValidator(_check_label)]
ExperimentName = Annotated[str, AfterValidator(check_experiment_name)]
Weight = Annotated[Number, Field(ge=0, le=1e6)]
Weights = Annotated[  # by variant
    dict[str, Weight], Field(max_length=MAX_VARIANTS), check_length(MAX_VARIANTS)
]
Unit = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Allowed = Annotated[dict[Unit, str], Field(max_length=MAX_LISTED), check_length(MAX_LISTED)]


def _check_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides as validated by the request's body."""
    for name in overrides:
        if name not in OVERRIDABLE:
            raise PydanticCustomError(
                "override",
                "{name}: can't be set by a variant; these can: {known}",
                {"name": name, "known": ", ".join(OVERRIDABLE)},
            )
    try:
        body = SamplingBody.model_validate(overrides)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PydanticCustomError(
            "override", "{where}: {what}", {"where": where, "what": first["msg"]}
        ) from error
    return {name: getattr(body, name) for name in overrides if overrides[name] is not None}


class Served(Body):
    """The model of a variant: a name, or a composition over the base."""

    name: Label
    model: Name | None = Field(None, min_length=1)  # base, adapter, version or alias
    adapters: Adapters = Field(default=[])
    turbo: Name | None = Field(None, min_length=1)  # default: the request's
    overrides: Annotated[dict[str, Any], AfterValidator(_check_overrides)] = Field(default={})

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.model is None) == (not self.adapters):
            raise InvalidRequestError(
                f"variants: {self.name!r} needs either model (a base, an adapter, an alias) or "
                "adapters (a composition)",
                param="variants",
            )
        return self

    def serves_as(self, other: Served) -> bool:
        """True if both serve the same, whatever their shares."""
        mine, its = ((v.model, v.adapters, v.turbo, v.overrides) for v in (self, other))
        return mine == its


class Variant(Served):
    """A variant that requests are assigned to."""

    weight: Weight = 1.0  # the share is the weight over the sum of all weights


class Shadow(Served):
    """A variant that also runs for a share of the requests; clients never see its answers."""

    share: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)


class Sticky(Body):
    """The subject that the assignment sticks to."""

    by: Literal["user", "header", "field", "random"]
    name: str | None = Field(None, min_length=1, max_length=64)  # the header's or field's name

    @model_validator(mode="after")
    def _named_where_needed(self) -> Self:
        needed = self.by in ("header", "field")
        if needed != (self.name is not None):
            what = "is required with" if needed else "makes no sense with"
            raise InvalidRequestError(f"sticky.name: {what} by {self.by!r}", param="sticky.name")
        return self


class RampStep(Body):
    """Change of the weights at a time: `at`, Unix seconds, or `after`, seconds from the start."""

    at: Number | None = Field(None, ge=0, le=MAX_SECONDS)
    after: Number | None = Field(None, ge=0, le=MAX_SECONDS)
    share: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    weights: Weights | None = None

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        for one, other in (("at", "after"), ("share", "weights")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise InvalidRequestError(
                    f"ramp: each step needs either {one} or {other}", param="ramp"
                )
        return self


class Metric(Body):
    """An outcome that clients report and that is compared between variants."""

    name: Label
    kind: Literal["number", "flag", "label"] = "number"
    goal: Literal["increase", "decrease"] = "increase"
    # The value of a unit without an outcome; default: such a unit is left out.
    missing: Number | None = Field(None, ge=-MAX_NUMBER, le=MAX_NUMBER)
    margin: Number | None = Field(None, gt=0, le=MAX_NUMBER)  # smaller differences don't matter

    @model_validator(mode="after")
    def _flag_or_not(self) -> Self:
        if self.missing is not None and self.kind != "number" and self.missing not in (0, 1):
            raise InvalidRequestError(
                f"metrics: missing of the {self.kind} {self.name!r} is 0 or 1", param="metrics"
            )
        return self


class Definition(Body):
    """An experiment as its owner defined it."""

    name: ExperimentName
    description: str = Field("", max_length=MAX_TEXT)
    variants: list[Variant] = Field(min_length=2, max_length=MAX_VARIANTS, fail_fast=True)
    control: Name | None = None  # default: the first variant
    sticky: Sticky = Field(default=Sticky(by="user", name=None))
    allow: Allowed = Field(default={})  # unit: variant
    # Units that get the control
    deny: list[Unit] = Field(default=[], max_length=MAX_LISTED, fail_fast=True)
    ramp: list[RampStep] = Field(default=[], max_length=MAX_STEPS, fail_fast=True)
    shadows: list[Shadow] = Field(default=[], max_length=MAX_SHADOWS, fail_fast=True)
    shadow_limit: int = Field(4, ge=1, le=64)  # concurrent shadow requests on one server
    metrics: list[Metric] = Field(default=[], max_length=MAX_METRICS, fail_fast=True)
    minimum: int = Field(100, ge=2, le=10**12)  # units of each variant before a decision is offered
    alpha: float = Field(0.05, ge=1e-6, le=0.4, allow_inf_nan=False)  # rate of false findings
    alias: Name | None = Field(None, min_length=1)  # moved by promote and rollback

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        _refuse_twins("variants", [*self.variants, *self.shadows])
        _refuse_twins("metrics", self.metrics)
        names = {variant.name for variant in self.variants}
        if self.control is not None:
            _refuse_unknown("control", [self.control], names)
        _refuse_unknown("allow", self.allow.values(), names)
        for metric in self.metrics:
            if metric.name in AUTOMATIC:
                raise _wrong("metrics", f"{metric.name!r} is measured by the server itself")
        if self.sticky.by == "random" and (self.allow or self.deny):
            raise _wrong("sticky", "lists of units need something that sticks; choose user")
        if both := sorted(set(self.allow) & set(self.deny)):
            raise _wrong("deny", f"{both[0]!r} is in allow as well; take it off one list")
        for step in self.ramp:
            _refuse_unknown("ramp", step.weights or (), names)
        for weights in self.stages():
            if not any(weights.values()):
                raise _wrong("variants", "all weights are zero; give one of them a share")
        return self

    @cached_property
    def denied(self) -> frozenset[str]:
        return frozenset(self.deny)

    @property
    def default(self) -> Variant:
        """The control variant."""
        return self.variants[0] if self.control is None else self.variant(self.control)

    def variant(self, name: str) -> Variant:
        """The variant with this name. Raises KeyError."""
        return {variant.name: variant for variant in self.variants}[name]

    @property
    def weights(self) -> dict[str, float]:
        return {variant.name: variant.weight for variant in self.variants}

    def stages(self) -> Iterator[dict[str, float]]:
        """The weights without a ramp, then those of its steps."""
        yield self.weights
        for step in self.ramp:
            yield self.weights_of(step)

    def weights_of(self, step: RampStep) -> dict[str, float]:
        """The weights from a step on. A `share` is divided by weight, and the control gets the
        rest."""
        if step.weights is not None:
            return {name: step.weights.get(name, 0.0) for name in self.weights}
        share, weights = step.share or 0.0, self.weights
        total, control = sum(weights.values()), self.default.name
        scaled = {name: share * weight for name, weight in weights.items()}
        scaled[control] += (1 - share) * total
        return scaled


def _wrong(param: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: {what}", param=param)


def _refuse_twins(param: str, named: Iterable[Served | Metric]) -> None:
    seen: set[str] = set()
    for each in named:
        if each.name in seen:
            raise _wrong(param, f"the name {each.name!r} is there twice; rename one")
        seen.add(each.name)


def _refuse_unknown(
    param: str, given: Iterable[str] | Mapping[str, object], names: set[str]
) -> None:
    for name in given:
        if name not in names:
            known = ", ".join(sorted(names))
            raise _wrong(param, f"there is no variant {name!r}; there are {known}")
