"""Assignment of a request to a variant, by a pure function of the time and a random draw.

A request without a subject (no `user`, header or field) is assigned at random, as if the
experiment were not sticky, and counts as a unit of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from quickchange_server.experiments.definition import Sticky
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.layout import SIZE, owner
from quickchange_server.frontend.request_observers import Assignment, How

UNIT_BYTES = 16


class Sender(Protocol):
    """The fields of a request's body that may hold the subject."""

    @property
    def user(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


def subject_of(sticky: Sticky, body: Sender, headers: Mapping[str, str]) -> str | None:
    """The subject that the request's assignment sticks to; None if the request has none."""
    match sticky.by:
        case "user":
            return body.user or None
        case "header":
            return headers.get(str(sticky.name)) or None
        case "field":
            return body.metadata.get(str(sticky.name)) or None
        case "random":
            return None


def unit_of(experiment: str, tenant: str, subject: str) -> str:
    """The subject's hash, 32 hexadecimal digits; it differs by experiment and tenant."""
    text = "\0".join((experiment, tenant, subject)).encode()
    return hashlib.sha256(text).hexdigest()[: 2 * UNIT_BYTES]


def point_of(unit: str) -> int:
    """The unit's point in 0 .. SIZE - 1."""
    return int(unit[:8], 16) % SIZE


def assign(
    experiment: Experiment, tenant: str, subject: str | None, draw: int, now: float
) -> Assignment:
    """Assign a request. `draw`: a random integer below SIZE, used if there is no subject."""
    definition = experiment.definition
    unit = None if subject is None else unit_of(experiment.id, tenant, subject)
    stretch = experiment.stretch(now)
    by: How
    if experiment.state != "running":
        variant, by = experiment.served, "state"
    elif subject is not None and subject in definition.allow:
        variant, by = definition.allow[subject], "list"
    elif subject is not None and subject in definition.denied:
        variant, by = definition.default.name, "list"
    else:
        division = experiment.stretches[stretch].layout
        variant = owner(division, draw if unit is None else point_of(unit))
        by = "random" if unit is None else "hash"
    return Assignment(
        experiment.name, variant, unit, by, experiment_id=experiment.id, stretch=stretch
    )
