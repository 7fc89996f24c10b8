"""Which variant a request gets. Pure: the time and the draw are handed in.

A subject that is missing (no `user`, header or field) has the request drawn at random, as if the
experiment were not sticky; it counts as a unit of its own.
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
    """What a request's body tells of who sends it."""

    @property
    def user(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


def subject_of(sticky: Sticky, body: Sender, headers: Mapping[str, str]) -> str | None:
    """What the request's assignment sticks to; None where it brings nothing."""
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
    """The subject's hash, 32 hexadecimal digits: another one in each experiment and tenant."""
    said = "\0".join((experiment, tenant, subject)).encode()
    return hashlib.sha256(said).hexdigest()[: 2 * UNIT_BYTES]


def point_of(unit: str) -> int:
    """The unit's place on the line."""
    return int(unit[:8], 16) % SIZE


def assign(
    experiment: Experiment, tenant: str, subject: str | None, draw: int, now: float
) -> Assignment:
    """The variant for a request. `draw`: a random number below SIZE, used where nothing sticks."""
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
