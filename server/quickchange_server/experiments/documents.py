"""Conversion of an experiment to and from the JSON document in the database."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.experiment import Experiment, Pointed, Promotion, Stretch


def encode(experiment: Experiment) -> str:
    """The JSON document; the version in it is also a column of its own."""
    return json.dumps(as_json(experiment), separators=(",", ":"))


def as_json(experiment: Experiment) -> dict[str, Any]:
    return {
        "id": experiment.id,
        "definition": experiment.definition.model_dump(mode="json"),
        "version": experiment.version,
        "state": experiment.state,
        "created": experiment.created,
        "started": experiment.started,
        "changed": experiment.changed,
        "stretches": [[stretch.begins, stretch.layout] for stretch in experiment.stretches],
        "winner": experiment.winner,
        "promotions": [asdict(promotion) for promotion in experiment.promotions],
    }


def decode(document: str) -> Experiment:
    read: dict[str, Any] = json.loads(document)
    return Experiment(
        id=read["id"],
        definition=Definition.model_validate(read["definition"]),
        version=read["version"],
        state=read["state"],
        created=read["created"],
        started=read["started"],
        changed=read["changed"],
        stretches=tuple(_stretch(begins, layout) for begins, layout in read["stretches"]),
        winner=read["winner"],
        promotions=tuple(_promotion(each) for each in read["promotions"]),
    )


def _stretch(begins: float, layout: list[tuple[int, str]]) -> Stretch:
    return Stretch(begins, tuple((end, variant) for end, variant in layout))


def _promotion(read: dict[str, Any]) -> Promotion:
    before = read["before"]
    return Promotion(read["variant"], read["alias"], None if before is None else Pointed(**before))
