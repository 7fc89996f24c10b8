"""A request whose `model` is an experiment: its variant, and what that changes of the body."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from quickchange_server.api.openai.requests import Sampled
from quickchange_server.entrypoints.app_state import Services
from quickchange_server.errors import AdapterFailedError, InvalidRequestError, QuickchangeError
from quickchange_server.experiments.assignment import assign, subject_of
from quickchange_server.experiments.definition import Served, Shadow
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.layout import SIZE
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_observers import Assignment

B = TypeVar("B", bound=Sampled)

logger = logging.getLogger(__name__)

_CHANCE = random.SystemRandom()


def assigned(
    services: Services,
    experiment: Experiment,
    caller: Caller,
    body: Sampled,
    headers: Mapping[str, str],
) -> Assignment:
    """The variant that answers. Raises InvalidRequestError where the body has a composition."""
    if body.adapters:
        raise InvalidRequestError(
            f"adapters: {experiment.name!r} is an experiment, which says itself what answers; "
            "remove it",
            param="adapters",
        )
    subject = subject_of(experiment.definition.sticky, body, headers)
    draw = _CHANCE.randrange(SIZE)
    return assign(experiment, caller.tenant, subject, draw, services.experiments.clock())


def shadows(experiment: Experiment) -> Iterator[Shadow]:
    """The shadows that this request gets, drawn by their shares; none unless it runs."""
    if experiment.state == "running":
        for shadow in experiment.definition.shadows:
            if _CHANCE.random() < shadow.share:
                yield shadow


def overridden(services: Services, body: B, variant: Served) -> B:
    """The body as the variant is asked for it."""
    changes: dict[str, Any] = {
        "model": variant.model or services.catalog.base_name,
        "adapters": variant.adapters,
        **variant.overrides,
    }
    if variant.turbo is not None:
        changes["turbo"] = variant.turbo
    wanted = variant.overrides.get("max_tokens")
    if wanted is not None:
        changes["min_tokens"] = min(body.min_tokens, wanted)
        if "max_completion_tokens" in type(body).model_fields:
            changes["max_completion_tokens"] = wanted
    return body.model_copy(update=changes)


def unservable(assignment: Assignment, error: QuickchangeError) -> AdapterFailedError:
    """What a client is told, who knows nothing of variants; the log has the rest."""
    logger.error(
        "the experiment %s can't serve its variant %s: %s",
        assignment.experiment,
        assignment.variant,
        error,
    )
    return AdapterFailedError(
        f"model: the experiment {assignment.experiment!r} names something that can't be served "
        "now; whoever runs it finds why in the server's log",
        param="model",
    )
