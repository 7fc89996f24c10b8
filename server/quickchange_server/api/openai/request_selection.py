"""Selection of what serves a validated body: its adapters, its drafter, its experiment's variant.

The part of admission that knows of bodies, names and experiments; `frontend/request_admission.py`
is the rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from quickchange_server.adapter_registry.composed_terms import weighted_names
from quickchange_server.adapter_registry.resolver import OFF, Selection
from quickchange_server.adapter_registry.visibility import Sees, everything
from quickchange_server.api.app_state import Services
from quickchange_server.api.openai.requests import Constrained, GenerationRequest
from quickchange_server.api.openai.text_constraints import asked
from quickchange_server.errors import AdapterFailedError, InvalidRequestError, QuickchangeError
from quickchange_server.experiments.assignment import assign, subject_of
from quickchange_server.experiments.definition import Served, Shadow
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.layout import SIZE
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.request_admission import Wanted
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.request_observers import Assignment
from quickchange_server.observability.gateways.load_report import FORMAT, REPORT, load_report
from quickchange_server.observability.naming import request_ids
from quickchange_server.protocol import Pooling, Submit
from quickchange_server.structured_output.validator import Asked

ADAPTERS = "x-quickchange-adapter"  # header with the digests of what answers

logger = logging.getLogger(__name__)

_CHANCE = random.SystemRandom()

B = TypeVar("B", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Order(Generic[B]):
    """A request with its adapters selected, before its prompt is tokenized."""

    caller: Caller
    model: str  # the client's own name for it
    body: B  # with the changes of the experiment's variant
    selection: Selection
    assignment: Assignment | None = None
    traceparent: str | None = None
    shadows: tuple[tuple[Assignment, Order[B]], ...] = ()  # generated beside it, never returned
    demanded: Asked | None = None  # a constraint that the body's own fields don't give (tools)
    shown: frozenset[int] = frozenset()  # special tokens that its answers' parsers look for
    shadow_limit: int = 0  # shadow requests of its experiment at once
    # Merges the selection's adapters into one that serves the request; returns its digest.
    derive: Callable[[], Awaitable[str]] | None = None

    def context(self, services: Services) -> int:
        """Tokens that its prompt and answer may have: the context's without virtual tokens."""
        return services.engine.max_model_len - self.selection.virtual_tokens

    @property
    def is_shadow(self) -> bool:
        return self.assignment is not None and self.assignment.shadow


async def select(
    services: Services, caller: Caller, body: B, headers: Mapping[str, str]
) -> Order[B]:
    """The order for a body: what its `model`, `adapters` and `turbo` name for this caller, fetched
    where the server fetches what it lacks."""
    traceparent = headers.get("traceparent")
    if not body.model:
        body = body.model_copy(update={"model": services.catalog.base_name})
    if (form := headers.get(FORMAT)) is not None:
        report = load_report(form, services.metrics.load(services.cluster))
        if report is not None:
            request_ids.answer_with(REPORT, report)
    if services.on_demand is not None:
        named_adapters = (body.model, *(entry.id for entry in body.adapters), body.turbo)
        await services.on_demand.ensure(named_adapters, caller.sees)
    named = services.experiments.find(body.model) if caller.sees(body.model) else None
    if named is None:
        selection = _selection(services, caller, body, caller.sees)
        return Order(caller, body.model, body, selection, traceparent=traceparent)
    services.catalog.select(
        services.catalog.base_name, turbo=body.turbo, sees=caller.sees, tenant=caller.tenant
    )
    assignment = _assigned(services, named, caller, body, headers)
    definition = named.definition
    order = _served(services, caller, body, assignment, definition.variant(assignment.variant))
    return replace(
        order,
        traceparent=traceparent,
        shadows=tuple(_shadows(services, caller, body, assignment, named)),
        shadow_limit=definition.shadow_limit,
    )


async def speaking(services: Services, order: Order[B]) -> Services:
    """The services with the tokenizer of an order's adapter, where it brings one.

    Raises AdapterFailedError where it can't be read.
    """
    text = await services.texts.of(order.selection.tokenizer)
    return services if text is services.text else replace(services, text=text)


def _served(
    services: Services, caller: Caller, body: B, assignment: Assignment, variant: Served
) -> Order[B]:
    """The order for a body under an experiment's variant. Raises AdapterFailedError."""
    changed = _overridden(services, caller, body, variant)
    try:  # the operator chose the variants, so that everything is seen
        selection = _selection(services, caller, changed, everything)
    except QuickchangeError as error:
        services.experiment_metrics.unservable(assignment)
        raise _unservable(assignment, error) from error
    return Order(caller, body.model, changed, selection, assignment)


def _shadows(
    services: Services, caller: Caller, body: B, assignment: Assignment, experiment: Experiment
) -> Iterator[tuple[Assignment, Order[B]]]:
    """A request's shadow orders. One that can't be served is logged and left out."""
    for shadow in _drawn(experiment):
        beside = replace(assignment, variant=shadow.name, shadow=True)
        with suppress(AdapterFailedError):
            yield beside, _served(services, caller, body, beside, shadow)


def _selection(
    services: Services, caller: Caller, body: GenerationRequest, sees: Sees
) -> Selection:
    composition = weighted_names(body.adapters)
    return services.catalog.select(
        body.model, composition, body.turbo, sees=sees, tenant=caller.tenant
    )


def _assigned(
    services: Services,
    experiment: Experiment,
    caller: Caller,
    body: GenerationRequest,
    headers: Mapping[str, str],
) -> Assignment:
    """The assignment to a variant. Raises InvalidRequestError where the body has a composition."""
    if body.adapters:
        raise InvalidRequestError(
            f"adapters: {experiment.name!r} is an experiment, which says itself what answers; "
            "remove it",
            param="adapters",
        )
    subject = subject_of(experiment.definition.sticky, body, headers)
    draw = _CHANCE.randrange(SIZE)
    return assign(experiment, caller.tenant, subject, draw, services.experiments.clock())


def _drawn(experiment: Experiment) -> Iterator[Shadow]:
    """Shadows drawn for this request by their shares; none unless the experiment runs."""
    if experiment.state == "running":
        for shadow in experiment.definition.shadows:
            if _CHANCE.random() < shadow.share:
                yield shadow


def _overridden(services: Services, caller: Caller, body: B, variant: Served) -> B:
    """The body with the variant's model, adapters and overrides.

    Where the variant's heads draft for another tenant alone, nothing drafts.
    """
    changes: dict[str, Any] = {
        "model": variant.model or services.catalog.base_name,
        "adapters": variant.adapters,
        **variant.overrides,
    }
    if variant.turbo is not None:
        drafts = services.catalog.drafts_for(variant.turbo, caller.tenant)
        changes["turbo"] = variant.turbo if drafts else OFF
    wanted = variant.overrides.get("max_tokens")
    if wanted is not None:
        changes["min_tokens"] = min(body.min_tokens, wanted)
        if "max_completion_tokens" in type(body).model_fields:
            changes["max_completion_tokens"] = wanted
    return body.model_copy(update=changes)


def _unservable(assignment: Assignment, error: QuickchangeError) -> AdapterFailedError:
    """The client's error, which names no variant; the log has the cause."""
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


def shown(assignment: Assignment) -> Json:
    """The answer's field `quickchange`: the assignment."""
    return {"experiment": assignment.experiment, "variant": assignment.variant}


def headers(assignment: Assignment | None) -> dict[str, str]:
    """The answer's headers for the assignment; none without one."""
    if assignment is None:
        return {}
    return {
        "x-quickchange-experiment": assignment.experiment,
        "x-quickchange-variant": assignment.variant,
    }


async def admit(
    services: Services,
    order: Order[B],
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    prompt_param: str,
    default_tokens: int | None,
    pooling: Pooling | None = None,
) -> Generation:
    """Admit an order with its tokenized prompts, and start its shadows.

    `default_tokens` is the limit of new tokens if the body has none; None: all that fit. Raises
    what `RequestAdmission.admit` raises.
    """
    body = order.body
    services = await speaking(services, order)  # a shadow's is its own
    if pooling is None:
        order.selection.check_generates()
    submit = _submit(services, order, request_id, pooling)
    wanted = Wanted(
        submit=submit,
        caller=order.caller,
        model=order.model,
        label=submit.label,
        drafter=submit.drafter,
        invocations=order.selection.invocations,
        prompts=prompts,
        prompt_param=prompt_param,
        candidates=body.candidates,
        default_tokens=default_tokens,
        constraint=order.demanded or await asked_of(body),
        shown=order.shown,
        scored_alike=body.stream,  # each streamed choice begins with its prompt's log-probabilities
        derive=order.derive,
        assignment=order.assignment,
        user=body.user,
        traceparent=order.traceparent,
        http_id=request_ids.current(),
        streamed=body.stream,
        observers=(services.exposures,) if order.is_shadow else services.books,
        text=services.text,
    )
    generation = await services.admission.admit(wanted)
    if submit.adapters and not order.is_shadow:
        serving = [order.selection.serving(prompt) for prompt in prompts]
        digests = sorted({component.digest for each in serving for component in each})
        if digests:  # else no prompt activates one
            request_ids.answer_with(ADAPTERS, ",".join(digests))
    again = partial(
        admit,
        services,
        prompts=prompts,
        prompt_param=prompt_param,
        default_tokens=default_tokens,
        pooling=pooling,
    )
    for number, (assignment, shadow) in enumerate(order.shadows):
        beside = partial(again, order=shadow, request_id=f"{request_id}.{number}")
        services.shadows.start(assignment, order.shadow_limit, beside)
    return generation


async def asked_of(body: Constrained) -> Asked | None:
    """The body's constraint, looked for on a thread: the checks of a large schema take long."""
    constrained = any(getattr(body, name) is not None for name in Constrained.model_fields)
    return await asyncio.to_thread(asked, body) if constrained else None


def check_tokens(services: Services, body: GenerationRequest) -> None:
    """Raise InvalidRequestError for token ids, or counts of them, that the model doesn't have."""
    for name in ("stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
        services.text.check_ids(getattr(body, name), name)
    services.text.check_ids(list(body.logit_bias), "logit_bias")
    body.check_logprobs(services.settings.max_logprobs, services.text.vocab_size)


def _submit(
    services: Services, order: Order[B], request_id: str, pooling: Pooling | None
) -> Submit:
    """The part of `Submit` that all choices share; the admission fills in the rest."""
    body = order.body
    check_tokens(services, body)
    selection, drafts = order.selection, pooling is None
    return Submit(
        request_id=request_id,
        prompt=(),
        sampling=body.sampling_params(),
        adapters=selection.adapters,
        drafting=selection.drafting if drafts else None,
        label=selection.label,
        drafter=selection.drafter if drafts else None,
        salt=order.caller.salt,
        cache_salt=body.cache_salt or "",
        bad_tokens=services.text.spellings(body.bad_words),
        background=order.is_shadow,
        pooling=pooling,
        seed=0,
    )
