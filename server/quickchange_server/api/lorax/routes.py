"""Routes of LoRAX that generate: /generate, /generate_stream and /; and /info."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Depends, Request, Response

from quickchange_server.api.app_state import VERSION, Injected, Services
from quickchange_server.api.auth import INFER, Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.lorax import translation
from quickchange_server.api.lorax.errors import failure
from quickchange_server.api.lorax.requests import (
    MAX_STOP_SEQUENCES,
    CompatGenerateRequest,
    GenerateRequest,
)
from quickchange_server.api.lorax.responses import (
    Candidate,
    RequestTimes,
    Shapes,
    accounting,
    identity,
)
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openapi.response_models import (
    LoraxErrorBody,
    LoraxGeneration,
    LoraxInfo,
    LoraxStreamEvent,
)
from quickchange_server.api.openapi.route_responses import events, lorax_errors
from quickchange_server.api.sse import event, event_stream, unless_gone
from quickchange_server.errors import EngineFailedError, InvalidRequestError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.generation import Generation
from quickchange_server.frontend.output_processor import LoggedToken
from quickchange_server.frontend.request_admission import choice_seed
from quickchange_server.frontend.request_base import MAX_CHOICES, Json

router = APIRouter(route_class=JsonRoute, tags=["LoRAX"], responses=lorax_errors(401, 403, 422))

_ERRORS = lorax_errors(413, 424, 429, 500, 503)
_EVENTS = events(LoraxStreamEvent | LoraxErrorBody)


@dataclass(frozen=True)
class LoraxWork:
    """A request under way."""

    request: GenerateRequest
    prompt: Sequence[int]
    generation: Generation
    seeds: Sequence[int | None]  # one per candidate; None: greedy
    shapes: Shapes
    clock: RequestTimes
    identity: dict[str, str] = field(default_factory=dict)  # headers known at admission

    @property
    def headers(self) -> dict[str, str]:
        """Headers that are known before the first token."""
        return self.identity | request_selection.headers(self.generation.account.opened.assignment)


@router.post("/generate", response_model=LoraxGeneration, responses=_ERRORS)
async def generate(
    request: Request, body: GenerateRequest, services: Injected, caller: Calling
) -> Response:
    """Generate text."""
    work = await _begin(services, caller, body, request)
    return await _whole_response(request, work, listed=False)


@router.post("/generate_stream", response_class=Response, responses=_ERRORS | _EVENTS)
async def generate_stream(
    request: Request, body: GenerateRequest, services: Injected, caller: Calling
) -> Response:
    """Generate text, with one server-sent event per token."""
    _check_stream(body)
    work = await _begin(services, caller, body, request, streamed=True)
    return await _stream_response(request, work)


@router.post("/", response_model=list[LoraxGeneration], responses=_ERRORS | _EVENTS)
async def compat_generate(
    request: Request, body: CompatGenerateRequest, services: Injected, caller: Calling
) -> Response:
    """Generate text, streamed if `stream` is set; otherwise the answer is a list of one."""
    if body.stream:
        return await generate_stream(request, body, services, caller)
    work = await _begin(services, caller, body, request)
    return await _whole_response(request, work, listed=True)


@router.get("/info", dependencies=[Depends(INFER)], response_model=LoraxInfo, responses=_ERRORS)
async def info(services: Injected) -> Json:
    """The server's model and limits, in LoRAX's terms."""
    settings, engine = services.settings, services.engine
    return {
        "model_id": services.catalog.base_name,
        "model_sha": None,
        "model_dtype": f"torch.{engine.dtype}",
        "model_device_type": settings.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_queue,
        "max_best_of": MAX_CHOICES,
        "max_stop_sequences": MAX_STOP_SEQUENCES,
        "max_input_length": engine.max_model_len - 1,
        "max_input_tokens": engine.max_model_len - 1,  # TGI's name of it
        "max_total_tokens": engine.max_model_len,
        "waiting_served_ratio": 0.0,  # new requests join at the next step
        "max_batch_total_tokens": engine.kv_blocks * engine.block_size,
        "max_waiting_tokens": 0,  # the same
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "eager_prefill": True,
        "router": "quickchange",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
    }


# --- admission and answers ----------------------------------------------------------------------


async def _begin(
    services: Services,
    caller: Caller,
    body: GenerateRequest,
    request: Request,
    *,
    streamed: bool = False,
) -> LoraxWork:
    """Translate the body, select its adapters, and admit the request."""
    clock = RequestTimes()
    given = body.parameters
    tokens = streamed or given.details or given.decoder_input_details or given.candidates > 1
    wanted = translation.completion(services, body, tokens=tokens)
    order = await translation.selected(services, caller, request.headers, given, wanted)
    services = await request_selection.speaking(services, order)
    prompt = await translation.prompt(services, body)
    admitting = request_selection.admit(
        services,
        order,
        [prompt],
        request_id=f"gen-{uuid.uuid4().hex}",
        prompt_param="inputs",
        default_tokens=None,
    )
    generation = await unless_gone(request, admitting)  # may wait for a merge
    clock.admit()
    first = (order.body.seed or 0) % 2**64
    drawn = order.body.sampling_params().temperature > 0
    seeds = [choice_seed(first, i) if drawn else None for i in range(order.body.n)]
    shapes = Shapes(services.text, given, body.inputs)
    known = identity(services, given, body.inputs, len(prompt))
    return LoraxWork(body, prompt, generation, seeds, shapes, clock, known)


def _check_stream(body: GenerateRequest) -> None:
    if body.parameters.candidates > 1:
        raise InvalidRequestError(
            "`best_of` != 1 is not supported when streaming tokens", param="best_of"
        )
    if body.parameters.decoder_input_details:
        raise InvalidRequestError(
            "`decoder_input_details` == true is not supported when streaming tokens",
            param="decoder_input_details",
        )


async def _whole_response(request: Request, work: LoraxWork, *, listed: bool) -> Response:
    try:
        answer, headers = await unless_gone(request, _whole(work))
    except BaseException:
        work.generation.close()
        raise
    content = json.dumps([answer] if listed else answer, ensure_ascii=False)
    return Response(content, media_type="application/json", headers=headers)


async def _whole(work: LoraxWork) -> tuple[Json, dict[str, str]]:
    """The whole answer as one JSON object, and its headers."""
    candidates = [Candidate(seed) for seed in work.seeds]
    async with aclosing(work.generation.pieces()) as pieces:
        async for index, piece in pieces:
            work.clock.token()
            candidates[index].add(piece)
    await work.generation.account.settled()
    best = max(range(len(candidates)), key=lambda index: candidates[index].mean_logprob)
    answer: Json = {"generated_text": work.shapes.generated_text(candidates[best])}
    given = work.request.parameters
    if given.details or given.decoder_input_details:
        answer["details"] = _details(work, candidates, best)
    counted = accounting(work.clock, work.generation.choices[best], len(work.prompt))
    return answer, work.headers | counted


def _details(work: LoraxWork, candidates: Sequence[Candidate], best: int) -> Json:
    choices, shapes, parts = work.generation.choices, work.shapes, []
    prefill = shapes.prefill(work.prompt, choices[0].prompt_logprobs)  # the same for all
    for index, candidate in enumerate(candidates):
        tokens = [shapes.token(token) for token in candidate.tokens]
        ending = shapes.ending(candidate, choices[index])
        part = {**ending, "prefill": prefill, "tokens": tokens}
        top = shapes.top(candidate.tokens)
        parts.append({**part, "top_tokens": top} if top else part)
    details = {**parts.pop(best), "prompt_tokens": len(work.prompt)}
    if parts:
        others = [*candidates[:best], *candidates[best + 1 :]]
        details["best_of_sequences"] = [
            {"generated_text": work.shapes.generated_text(other), **part}
            for other, part in zip(others, parts, strict=True)
        ]
    return details


async def _stream_response(request: Request, work: LoraxWork) -> Response:
    try:
        return await event_stream(request, _events(work), work.headers, failure)
    except BaseException:
        work.generation.close()
        raise


async def _events(work: LoraxWork) -> AsyncGenerator[bytes, None]:
    """One event per token; the last has the text and, if requested, the details."""
    shapes, candidate = work.shapes, Candidate(work.seeds[0])
    tokens: tuple[LoggedToken, ...] = ()
    index = 0  # of the last token that was told, from 1
    async with aclosing(work.generation.pieces()) as pieces:
        async for _, piece in pieces:
            tokens = candidate.add(piece)
            for token in tokens if piece.ending is None else tokens[:-1]:
                index += 1
                told = _told(shapes, index, token)
                yield event({**told, "generated_text": None, "details": None})
    await work.generation.account.settled()
    if not tokens:
        raise EngineFailedError("the engine ended the text without a token")
    details = None
    if work.request.parameters.details:
        ending = shapes.ending(candidate, work.generation.choices[0])
        length = len(work.prompt)
        details = {**ending, "prompt_tokens": length, "input_length": length}
    last = _told(shapes, index + 1, tokens[-1])
    yield event({**last, "generated_text": shapes.generated_text(candidate), "details": details})


def _told(shapes: Shapes, index: int, token: LoggedToken) -> Json:
    """The fields of a stream's event that tell a token."""
    told: Json = {"index": index, "token": shapes.token(token)}
    for top in shapes.top([token]):
        told["top_tokens"] = top
    return told
