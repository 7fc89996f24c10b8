"""A request for pooled hidden states, from its prompts to one vector for each, and its envelope."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Request, Response

from quickchange_server.api.app_state import Services
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.chat.chat_requests import chat_length
from quickchange_server.api.openai.completions import several_of
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.requests import CompletionRequest, Truncation
from quickchange_server.api.pooling.pooling_requests import PooledRequest, TextRequest
from quickchange_server.api.pooling.prompt_cut import text_ids, truncation
from quickchange_server.api.sse import unless_gone
from quickchange_server.errors import AdapterWeightsError, EngineFailedError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.embedding import Floats, vector
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.request_base import Json
from quickchange_server.frontend.request_observers import Opened
from quickchange_server.protocol import Pooling
from quickchange_store.canonical.classifier_part import ClassifierHead

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolingCall:
    """A validated body with what serves it."""

    services: Services
    request: Request
    body: PooledRequest
    order: Order[CompletionRequest]

    @property
    def cut(self) -> Truncation:
        """The cut of prompts. Raises InvalidRequestError."""
        body, context = self.body, self.order.context(self.services)
        return truncation(body.truncate_prompt_tokens, body.truncation_side, context)


@dataclass(frozen=True)
class Pooled:
    """One hidden state [H] for each prompt, and the account of the request."""

    vectors: Sequence[Floats]
    opened: Opened
    id: str  # of the answer

    @property
    def states(self) -> Floats:
        """All of them, [n, H]."""
        return np.stack(self.vectors)

    @property
    def envelope(self) -> Json:
        """Fields that every answer has, and the usage."""
        opened = self.opened
        return {"id": self.id, "model": opened.model, "usage": self.usage}

    @property
    def usage(self) -> Json:
        tokens = self.opened.prompt_tokens
        return {"prompt_tokens": tokens, "total_tokens": tokens}

    def answer(self, fields: Mapping[str, Any]) -> Response:
        """The answer, with the experiment's variant where there is one."""
        return self.bare({**fields, **self.envelope})

    def bare(self, fields: Mapping[str, Any]) -> Response:
        """An answer of these fields alone, and the experiment's variant."""
        content = dict(fields)
        if self.opened.assignment is not None:
            content["quickchange"] = request_selection.shown(self.opened.assignment)
        return Response(json.dumps(content), media_type="application/json", headers=self.headers)

    def listed(self, data: Sequence[Json]) -> Response:
        """An answer that lists its parts, as OpenAI's and vLLM's do."""
        created = int(self.opened.at)
        return self.answer({"object": "list", "created": created, "data": list(data)})

    @property
    def headers(self) -> dict[str, str]:
        return request_selection.headers(self.opened.assignment)


async def call(
    request: Request, services: Services, caller: Caller, body: PooledRequest
) -> PoolingCall:
    """The call of a body, with its adapters selected."""
    wanted = body.as_completion(services.catalog.base_name)
    order = await request_selection.select(services, caller, wanted, request.headers)
    services = await request_selection.speaking(services, order)
    return PoolingCall(services, request, body, order)


async def prompts_of(call: PoolingCall, body: TextRequest) -> list[Sequence[int]]:
    """Token ids of a body's texts, or of its chat, cut as it asks."""
    services, cut = call.services, call.cut
    most = services.engine.max_model_len
    special = body.add_special_tokens
    if body.messages is not None:
        messages = body.messages
        ids = await services.text.encode_chat(
            lambda: [message.for_template() for message in messages],
            chat_length(messages, []) + body.rendered_length,
            most=most if cut.keep is None else CONTEXTS * most,
            param="messages",
            how=body.how,
            add_special_tokens=bool(special),
        )
        return [cut.of(ids)]
    assert body.input is not None
    given = several_of(body.input)
    texts = [one for one in given if isinstance(one, str)]
    if texts:
        return await text_ids(
            services.text, texts, cut, most=most, param="input", special=special is not False
        )
    ids_of_each: list[Sequence[int]] = [cut.of(one) for one in given if not isinstance(one, str)]
    for one in ids_of_each:
        services.text.check_ids(one, "input")
    return ids_of_each


async def pooled(
    call: PoolingCall, prompts: Sequence[Sequence[int]], *, kind: str, param: str, pooling: Pooling
) -> Pooled:
    """The prompts' states. `kind`: begins the request's id; `param`: the prompts' field."""
    number = uuid.uuid4().hex
    async with _admitted(call, prompts, f"{kind}-{number}", param, pooling) as generation:
        vectors = await unless_gone(call.request, _vectors(generation))
        await generation.account.settled()
    own = call.body.request_id
    return Pooled(vectors, generation.account.opened, f"{kind}-{number if own is None else own}")


@asynccontextmanager
async def _admitted(
    call: PoolingCall,
    prompts: Sequence[Sequence[int]],
    request_id: str,
    param: str,
    pooling: Pooling,
) -> AsyncIterator[Generation]:
    generation = await request_selection.admit(
        call.services,
        call.order,
        prompts,
        request_id=request_id,
        prompt_param=param,
        default_tokens=None,
        pooling=pooling,
    )
    try:
        yield generation
    except BaseException:
        generation.close()
        raise


async def _vectors(generation: Generation) -> Sequence[Floats]:
    """One hidden state [H] per prompt."""
    async for _ in generation.pieces():
        pass
    vectors = []
    for choice in generation.choices:
        if choice.embedding is None:
            raise EngineFailedError("the engine ended an embedding without a vector; try again")
        vectors.append(vector(choice.embedding))
    return vectors


def classes(head: ClassifierHead, states: Floats, *, activation: bool) -> list[list[float]]:
    """What a head says of each state, as float32: probabilities, or scores without `activation`.

    Raises AdapterWeightsError for numbers that are not finite.
    """
    scores = head.scores(states)
    with np.errstate(over="ignore"):
        told = (head.probabilities(scores) if activation else scores).astype(np.float32)
    if not np.isfinite(told).all():
        raise AdapterWeightsError(
            "model: with this classification head the scores are not finite; train it again with "
            "a smaller learning rate",
            param="model",
        )
    found: list[list[float]] = told.tolist()
    return found
