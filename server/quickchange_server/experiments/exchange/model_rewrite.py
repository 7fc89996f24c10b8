"""Experiments as InferenceModelRewrite, the Gateway API inference extension's weighted models.

A rewrite draws one of its targets for each request; an experiment keeps a unit where it is. So the
shares are exchanged and what else an experiment says is named as left out. HTTP is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from quickchange_server.errors import InvalidRequestError
from quickchange_server.experiments.definition import (
    MAX_VARIANTS,
    Definition,
    Served,
    Sticky,
    Variant,
    is_label,
)
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.layout import SIZE, shares
from quickchange_server.frontend.request_base import Body, Json, Name

API: Literal["inference.networking.x-k8s.io/v1alpha2"] = "inference.networking.x-k8s.io/v1alpha2"
KIND: Literal["InferenceModelRewrite"] = "InferenceModelRewrite"
VARIANTS = "quickchange-variants"  # annotation: the variants' names, in the targets' order
MAX_WEIGHT = 1_000_000
MAX_RULES = 64
STICKY = (
    "a rewrite draws a target for each request, whoever sends it: users don't stay with a variant"
)


class RewriteTarget(Body):
    modelRewrite: Name = Field(min_length=1)  # noqa: N815  # Kubernetes' spelling
    weight: int | None = Field(None, ge=1, le=MAX_WEIGHT)


class ModelMatch(Body):
    value: Name = Field(min_length=1)
    type: Literal["Exact"] = "Exact"


class Match(Body):
    model: ModelMatch


class RewriteRule(Body):
    targets: list[RewriteTarget] = Field(min_length=1, max_length=MAX_VARIANTS, fail_fast=True)
    matches: list[Match] = Field(default=[], max_length=MAX_RULES, fail_fast=True)


class PoolRef(Body):
    name: Name = Field(min_length=1)
    group: Name = "inference.networking.k8s.io"
    kind: Name = "InferencePool"


class Spec(Body):
    rules: list[RewriteRule] = Field(min_length=1, max_length=MAX_RULES, fail_fast=True)
    poolRef: PoolRef | None = None  # noqa: N815


class Rewrite(Body):
    """An InferenceModelRewrite; of its metadata the variants' names alone are read."""

    hints = frozenset({"status"})

    spec: Spec
    apiVersion: Literal["inference.networking.x-k8s.io/v1alpha2"] = API  # noqa: N815
    kind: Literal["InferenceModelRewrite"] = KIND
    metadata: dict[str, Any] = Field(default={})


@dataclass(frozen=True, slots=True)
class Exported:
    """A rewrite, and what the experiment says that it can't."""

    document: Json
    left_out: tuple[str, ...]


def exported(experiment: Experiment, now: float, *, pool: str) -> Exported:
    """The experiment's present shares as a rewrite of a pool's requests.

    Raises InvalidRequestError for a variant that no model's name stands for.
    """
    definition = experiment.definition
    weights = _weights(experiment, now)
    served = [variant for variant in definition.variants if weights.get(variant.name)]
    for variant in served:
        if variant.model is None:
            raise InvalidRequestError(
                f"variants: {variant.name!r} is a composition of adapters, and a rewrite names one "
                "model; merge them into an adapter, or give the variant no weight",
                param="variants",
            )
    targets = [{"modelRewrite": v.model, "weight": weights[v.name]} for v in served]
    match = {"model": {"type": "Exact", "value": experiment.name}}
    document = {
        "apiVersion": API,
        "kind": KIND,
        "metadata": {
            "name": _resource_name(experiment.name),
            "annotations": {VARIANTS: ",".join(variant.name for variant in served)},
        },
        "spec": {
            "poolRef": PoolRef.model_validate({"name": pool}).model_dump(),
            "rules": [{"matches": [match], "targets": targets}],
        },
    }
    return Exported(document, tuple(_left_out(experiment, served)))


def _weights(experiment: Experiment, now: float) -> dict[str, int]:
    """A whole number for each variant that gets anything now: the definition's own, or millionths
    of the present share."""
    if experiment.state != "running":
        return {experiment.served: 1}
    held = shares(experiment.stretches[experiment.stretch(now)].layout)
    total = sum(experiment.definition.weights.values())
    own = {name: weight for name, weight in experiment.definition.weights.items() if weight}
    whole = all(weight == int(weight) and weight <= MAX_WEIGHT for weight in own.values())
    if whole and all(
        abs(held.get(n, 0) / SIZE - weight / total) < 1 / MAX_WEIGHT for n, weight in own.items()
    ):
        return {name: int(weight) for name, weight in own.items()}
    return {name: max(1, round(size / SIZE * MAX_WEIGHT)) for name, size in held.items()}


def _left_out(experiment: Experiment, served: Sequence[Variant]) -> Iterator[str]:
    definition = experiment.definition
    yield f"sticky: {STICKY}"
    if experiment.state != "running":
        yield f"state: it is {experiment.state}, so all requests get {experiment.served!r}"
    for variant in definition.variants:
        if variant not in served and experiment.state == "running":
            yield f"variants: {variant.name!r} has no share now, and a target has a weight"
    for variant in served:
        yield from _changes(variant)
    if len(definition.ramp) and experiment.state == "running":
        yield "ramp: a rewrite has the shares of this moment; export it again after each step"
    for name in ("allow", "deny", "shadows"):
        if getattr(definition, name):
            yield f"{name}: a rewrite has none"
    if definition.metrics:
        yield "metrics: outcomes and results stay here"


def _changes(variant: Served) -> Iterator[str]:
    for name in ("overrides", "turbo"):
        if getattr(variant, name):
            yield f"variants: the {name} of {variant.name!r} are not sent along"


def _resource_name(name: str) -> str:
    """A name that Kubernetes takes: lower case, and dashes between."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:253].strip("-")
    return plain or "experiment"


def imported(rewrite: Rewrite) -> tuple[list[Definition], list[str]]:
    """An experiment for every model that a rule splits, and lines on what could not be taken.

    Raises InvalidRequestError where nothing can.
    """
    made: dict[str, Definition] = {}
    lines = [f"sticky: by user. {STICKY}; here they do"]
    names = _annotated(rewrite.metadata)
    for index, rule in enumerate(rewrite.spec.rules):
        place = f"spec.rules[{index}]"
        if not rule.matches:
            lines.append(f"{place}: matches every model, and an experiment is a name; left out")
        elif len(rule.targets) < 2:
            lines.append(f"{place}: has one target; point an alias at it instead; left out")
        for match in rule.matches if len(rule.targets) > 1 else ():
            name = match.model.value
            if name in made:
                lines.append(f"{place}: an earlier rule has {name!r}; left out")
                continue
            made[name] = Definition(
                name=name,
                variants=_variants(rule, place, names),
                sticky=Sticky(by="user", name=None),
            )
    if not made:
        raise InvalidRequestError(
            f"spec.rules: none splits a model between targets: {'; '.join(lines[1:])}",
            param="spec.rules",
        )
    return list(made.values()), lines


def _variants(rule: RewriteRule, place: str, names: Sequence[str]) -> list[Variant]:
    given = [target.weight for target in rule.targets]
    if None in given and any(given):
        raise InvalidRequestError(
            f"{place}.targets: give all of them a weight, or none", param=f"{place}.targets"
        )
    labels = names if len(names) == len(given) else [target.modelRewrite for target in rule.targets]
    taken: dict[str, None] = {}
    for label in labels:
        taken[_label(label, taken)] = None
    return [
        Variant(name=label, model=target.modelRewrite, weight=target.weight or 1)
        for label, target in zip(taken, rule.targets, strict=True)
    ]


def _label(text: str, taken: Mapping[str, None]) -> str:
    """A variant's name like `text` that is not taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", text)[:60]
    plain = plain if is_label(plain) else f"v{plain}"
    label, number = plain, 2
    while label in taken:
        label, number = f"{plain}-{number}", number + 1
    return label


def _annotated(metadata: Mapping[str, Any]) -> list[str]:
    annotations = metadata.get("annotations")
    value = annotations.get(VARIANTS) if isinstance(annotations, dict) else None
    return value.split(",") if isinstance(value, str) and value else []
