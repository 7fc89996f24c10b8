"""OpenAI's route for text: /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request, Response

from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.answering import Answer, envelope_of, respond
from quickchange_server.api.openai.requests import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from quickchange_server.api.openai.responses import (
    CompletionShape,
    EchoShape,
    PromptReport,
    TokenReport,
    prompt_report,
)
from quickchange_server.api.openapi.response_models import (
    CompletionChunk,
    ErrorBody,
    TextCompletion,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, GENERATION_ERRORS, events

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"], responses=COMMON_ERRORS)

AnyPrompt = str | list[str] | list[int] | list[list[int]]


def several_of(prompt: AnyPrompt) -> Sequence[str | list[int]]:
    """The list of prompts, each text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return cast("list[list[int]]", [prompt])
    return cast("list[str | list[int]]", prompt)


async def token_ids(
    services: Services,
    prompt: AnyPrompt,
    param: str,
    *,
    most: int | None = None,
    special: bool = True,
) -> list[list[int]]:
    """The prompts' token ids; text is encoded with the tokenizer's own special tokens, if
    `special`. `most`: of each prompt; None: as many as the context holds."""
    several, most = several_of(prompt), most or services.engine.max_model_len
    if isinstance(several[0], str):
        texts = cast("Sequence[str]", several)
        return await services.text.encode_each(texts, most, param, special=special)
    given = cast("list[list[int]]", several)
    for ids in given:
        services.text.check_ids(ids, param)
    return given


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses=GENERATION_ERRORS | events(CompletionChunk | ErrorBody, last="[DONE]"),
)
async def completions(
    request: Request, body: CompletionRequest, services: Injected, caller: Calling
) -> Response:
    """Continue a prompt."""
    order = await request_selection.select(services, caller, body, request.headers)
    services = await request_selection.speaking(services, order)
    body = order.body
    limit = order.context(services)
    sent = await token_ids(
        services,
        body.prompt,
        "prompt",
        most=body.most_prompt_tokens(limit),
        special=body.add_special_tokens,
    )
    prompts = [body.truncated(ids, limit) for ids in sent]
    generation = await request_selection.admit(
        services,
        order,
        prompts,
        request_id=f"cmpl-{uuid.uuid4().hex}",
        prompt_param="prompt",
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )
    as_ids = body.return_tokens_as_token_ids
    shape = CompletionShape(services.text, body.logprobs is not None, as_ids=as_ids)
    if body.echo:
        repeated = _repeated(services, body, sent, prompts)
        shape = EchoShape(services.text, body, repeated, generation.choices)
    report = TokenReport(services.text, body, prompts, generation.choices, in_choices=True)
    drafting = order.selection.drafting is not None
    envelope = envelope_of(services, generation)
    answer = Answer(envelope, shape, report, generation, drafting, body.n, body.candidates)
    return await respond(request, body, answer)


def _repeated(
    services: Services,
    body: CompletionRequest,
    sent: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
) -> list[PromptReport]:
    """The prompts as they are repeated: those that were cut, as they were served."""
    return [
        prompt_report(services.text, own if isinstance(own, str) and whole == ids else None, ids)
        for own, whole, ids in zip(several_of(body.prompt), sent, prompts, strict=True)
    ]
