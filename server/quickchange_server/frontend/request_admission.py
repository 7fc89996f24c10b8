"""From a validated body to what the engine is asked for: names, experiments, limits, admission."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from quickchange_server.adapter_registry.resolver import Selection, WeightedName
from quickchange_server.adapter_registry.visibility import Sees, everything
from quickchange_server.api.openai.requests import Sampled
from quickchange_server.api.openai.responses import Json
from quickchange_server.api.openai.text_constraints import Asked, asked
from quickchange_server.engine_client.client import Generation
from quickchange_server.entrypoints.app_state import Services
from quickchange_server.errors import (
    AdapterFailedError,
    ContextLengthError,
    InvalidRequestError,
    QuickchangeError,
)
from quickchange_server.experiments.definition import Served
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.frontend import assigning
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.generation import Choices, choice_seed
from quickchange_server.frontend.output_processor import Transcript
from quickchange_server.frontend.request_observers import Account, Assignment, Opened, Running
from quickchange_server.protocol import Component, Pooling
from quickchange_store.merging import Recipe

B = TypeVar("B", bound=Sampled)


@dataclass(frozen=True, slots=True)
class Order(Generic[B]):
    """What is to be generated, and for whom, before its prompt is tokens."""

    caller: Caller
    model: str  # as the client named it
    body: B  # with what the experiment's variant changes
    selection: Selection
    assignment: Assignment | None = None
    traceparent: str | None = None
    shadows: tuple[tuple[Assignment, Order[B]], ...] = ()  # computed beside it, never shown
    demanded: Asked | None = None  # what the text must be for another reason than those fields
    shadow_limit: int = 0  # of its experiment's shadows at once
    recipe: Recipe | None = None  # what the selection's adapters are merged by, before they serve

    @property
    def is_shadow(self) -> bool:
        return self.assignment is not None and self.assignment.shadow


def select(services: Services, caller: Caller, body: B, headers: Mapping[str, str]) -> Order[B]:
    """What the body's `model`, `adapters` and `turbo` name for this caller."""
    traceparent = headers.get("traceparent")
    named = services.experiments.find(body.model) if caller.sees(body.model) else None
    if named is None:
        selection = _selection(services, body, caller.sees)
        return Order(caller, body.model, body, selection, traceparent=traceparent)
    services.catalog.select(services.catalog.base_name, turbo=body.turbo, sees=caller.sees)
    assignment = assigning.assigned(services, named, caller, body, headers)
    definition = named.definition
    order = _served(services, caller, body, assignment, definition.variant(assignment.variant))
    return replace(
        order,
        traceparent=traceparent,
        shadows=tuple(_shadows(services, caller, body, assignment, named)),
        shadow_limit=definition.shadow_limit,
    )


def _served(
    services: Services, caller: Caller, body: B, assignment: Assignment, variant: Served
) -> Order[B]:
    """The order that a variant of an experiment makes of a body. Raises AdapterFailedError."""
    changed = assigning.overridden(services, body, variant)
    try:
        selection = _selection(services, changed, everything)  # variants are the operator's
    except QuickchangeError as error:
        services.experiment_metrics.unservable(assignment)
        raise assigning.unservable(assignment, error) from error
    return Order(caller, body.model, changed, selection, assignment)


def _shadows(
    services: Services, caller: Caller, body: B, assignment: Assignment, experiment: Experiment
) -> Iterator[tuple[Assignment, Order[B]]]:
    """The shadows of a request. One that can't be served must not cost the request its answer."""
    for shadow in assigning.shadows(experiment):
        beside = replace(assignment, variant=shadow.name, shadow=True)
        with suppress(AdapterFailedError):  # logged
            yield beside, _served(services, caller, body, beside, shadow)


def _selection(services: Services, body: Sampled, sees: Sees) -> Selection:
    composition = [WeightedName(entry.id, entry.weight) for entry in body.adapters]
    return services.catalog.select(body.model, composition, body.turbo, sees=sees)


def shown(assignment: Assignment) -> Json:
    """An assignment as the answer's field tells it."""
    return {"experiment": assignment.experiment, "variant": assignment.variant}


def headers(assignment: Assignment | None) -> dict[str, str]:
    """An assignment as the answer's headers tell it."""
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
) -> Running:
    """All choices of a request: its `candidates` for each prompt, in the order of the prompts.

    `default_tokens` are generated at most where the body doesn't say; None: all that fit. With
    `pooling` embeddings are made instead, of prompts that may fill the context. Raises
    InvalidRequestError, ContextLengthError, RateLimitedError, QueueFullError or UnavailableError,
    and what merging by the order's recipe raises; then nothing runs.
    """
    body = order.body
    count = len(prompts) * body.candidates
    if count > services.settings.max_queue:
        param = "n" if pooling is None else prompt_param
        raise InvalidRequestError(
            f"{param}: {count} sequences in one request exceed the setting max_queue, "
            f"{services.settings.max_queue}; send fewer prompts or a smaller n",
            param=param,
        )
    _check_tokens(services, body)
    wanted = asked(body) or order.demanded
    constraint = None if wanted is None else await services.constraints.accept(wanted)
    default_tokens = _allowed(order.caller, default_tokens, count)
    seed = services.seeds.draw() if body.seed is None else body.seed % 2**64
    orders: list[tuple[Generation, Transcript]] = []
    for prompt in prompts:
        new_tokens = 0
        if pooling is None:
            room = _room(services, body, len(prompt), prompt_param)
            new_tokens = _max_tokens(body, room, default_tokens)
        else:
            _check_fits(services, len(prompt), prompt_param)
        sampling = body.sampling_params().resolved(
            max_tokens=new_tokens, eos_ids=services.text.eos_ids
        )
        for choice in range(body.candidates):
            # The log-probabilities of one prompt are the same in all its choices; a stream begins
            # each with them.
            scored = choice == 0 or body.stream
            generation = Generation(
                request_id=f"{request_id}-{len(orders)}",
                prompt=tuple(prompt),
                sampling=sampling if scored else replace(sampling, prompt_logprobs=None),
                adapters=order.selection.adapters,
                label=order.selection.label,
                drafting=order.selection.drafting if pooling is None else None,
                drafter=order.selection.drafter if pooling is None else None,
                constraint=constraint,
                salt=order.caller.salt,
                background=order.is_shadow,
                pooling=pooling,
                seed=choice_seed(seed, choice),
            )
            orders.append((generation, Transcript(services.text, sampling)))
    books = (services.exposures,) if order.is_shadow else services.books
    account = Account.open(_opened(order, prompts, orders, request_id), books)
    try:
        if order.recipe is not None:
            orders = await _merged(services, order.recipe, orders)
        choices = await Choices.admit(services.client, orders, body.candidates)
    except asyncio.CancelledError:
        account.end("cancelled")
        raise
    except BaseException:
        account.end("refused")
        raise
    for number, (assignment, shadow) in enumerate(order.shadows):
        again = partial(
            admit,
            services,
            shadow,
            prompts,
            request_id=f"{request_id}.{number}",
            prompt_param=prompt_param,
            default_tokens=default_tokens,
            pooling=pooling,
        )
        services.shadows.start(assignment, order.shadow_limit, again)
    return Running(choices, account)


async def _merged(
    services: Services, recipe: Recipe, orders: Sequence[tuple[Generation, Transcript]]
) -> list[tuple[Generation, Transcript]]:
    """The orders with the derived adapter, which is made for nobody whom the engine refuses."""
    services.client.check_room(len(orders))
    derived = (Component(await services.derived.digest(recipe)),)
    return [(replace(generation, adapters=derived), told) for generation, told in orders]


def _opened(
    order: Order[B],
    prompts: Sequence[Sequence[int]],
    orders: Sequence[tuple[Generation, Transcript]],
    request_id: str,
) -> Opened:
    return Opened(
        request_id=request_id,
        caller=order.caller,
        model=order.model,
        label=order.selection.label,
        prompt_tokens=sum(map(len, prompts)),
        max_tokens=sum(generation.sampling.token_limit for generation, _ in orders),
        choices=len(orders),
        at=time.time(),
        assignment=order.assignment,
        user=order.body.user,
        traceparent=order.traceparent,
    )


def _check_tokens(services: Services, body: Sampled) -> None:
    services.text.check_ids(body.stop_token_ids, "stop_token_ids")
    services.text.check_ids(list(body.logit_bias), "logit_bias")


def _check_fits(services: Services, tokens: int, param: str) -> None:
    """Raises where a prompt is empty or exceeds the context."""
    limit = services.engine.max_model_len
    if tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a text", param=param)
    if tokens > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and {param} has {tokens}; "
            "shorten it",
            param=param,
        )


def _room(services: Services, body: Sampled, prompt_tokens: int, param: str) -> int:
    """Tokens that may follow the prompt. Raises where it, or what is wanted, is too long."""
    limit = services.engine.max_model_len
    if prompt_tokens == 0:
        raise InvalidRequestError(f"{param}: has no tokens; give a prompt", param=param)
    if prompt_tokens >= limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and the prompt has "
            f"{prompt_tokens}, which leaves no room for an answer; shorten {param}",
            param=param,
        )
    wanted = body.wanted_tokens
    if wanted is not None and prompt_tokens + wanted > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and you asked for "
            f"{prompt_tokens + wanted} ({prompt_tokens} in {param}, {wanted} to generate); "
            f"shorten {param} or lower max_tokens to {limit - prompt_tokens}",
            param=param,
        )
    return limit - prompt_tokens


def _allowed(caller: Caller, default_tokens: int | None, choices: int) -> int | None:
    """The default of new tokens where the caller's limit, shared by all choices, is lower."""
    if caller.max_new_tokens is None:
        return default_tokens
    share = max(1, caller.max_new_tokens // choices)
    return share if default_tokens is None else min(default_tokens, share)


def _max_tokens(body: Sampled, room: int, default_tokens: int | None) -> int:
    if body.wanted_tokens is not None:
        return body.wanted_tokens
    most = room if default_tokens is None else min(default_tokens, room)
    if body.min_tokens > most:
        raise InvalidRequestError(
            f"min_tokens: {body.min_tokens} exceeds max_tokens, {most} by default; "
            "lower it, or set max_tokens",
            param="min_tokens",
        )
    return most
