"""Errors in LoRAX's form, `{"error", "error_type"}` with its statuses, on its routes alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from quickchange_server.api.error_responses import from_store, from_validation
from quickchange_server.errors import (
    AdapterFailedError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    QueueFullError,
    QuickchangeError,
    RateLimitedError,
    RequestFailedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)
from quickchange_server.frontend.request_base import Json
from quickchange_store.errors import StoreError

# LoRAX's names of the fields that messages mention; longer names first.
_NAMES = (
    (re.compile(r"\badapters\[(\d+)\]\.id\b"), r"merged_adapters.ids[\1]"),
    (re.compile(r"^adapters: "), "merged_adapters: "),
    (re.compile(r"^model: "), "adapter_id: "),
    (re.compile(r"\bmax_tokens\b"), "max_new_tokens"),
    (re.compile(r"\bresponse_format\.json_schema\.schema\b"), "response_format.schema"),
)


def lorax_error(error: QuickchangeError) -> tuple[int, str, str]:
    """The error's HTTP status, LoRAX's `error_type`, and the message."""
    message = error.message
    for pattern, name in _NAMES:
        message = pattern.sub(name, message)
    match error:
        case InvalidRequestError() | ConflictError():
            return 422, "validation", f"Input validation error: {message}"
        case UnknownModelError() | AdapterFailedError() | RequestFailedError():
            return 424, "generation", f"Request failed during generation: {message}"
        case QueueFullError() | RateLimitedError():
            return 429, "overloaded", f"Model is overloaded: {message}"
        case UnavailableError():
            return 503, "healthcheck", f"unhealthy: {message}"
        case UnauthenticatedError():
            return error.status, "authentication", message
        case ForbiddenError():
            return error.status, "permission", message
        case _:
            return 500, "incomplete_generation", f"Incomplete generation: {message}"


def failure(error: QuickchangeError) -> Json:
    """The error's body, the same in a response and in a stream's event."""
    _, kind, message = lorax_error(error)
    return {"error": message, "error_type": kind}


def refusal(error: QuickchangeError, status: int | None = None) -> Response:
    """The response to a failed request. `status` overrides LoRAX's."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    content = json.dumps(failure(error))  # ASCII: messages may quote lone surrogates
    status = lorax_error(error)[0] if status is None else status
    return Response(content, status, headers=headers, media_type="application/json")


def install(app: FastAPI, paths: Collection[str]) -> None:
    """Register handlers with LoRAX's form for these paths, after `error_responses.install`."""

    def answer(kind: type[Exception], answered: Callable[[Any], Response]) -> None:
        otherwise = app.exception_handlers[kind]

        async def handler(request: Request, error: Exception) -> Response:
            if request.url.path in paths:
                return answered(error)
            response = otherwise(request, error)
            assert isinstance(response, Awaitable)
            answer_of_others = await response
            assert isinstance(answer_of_others, Response)
            return answer_of_others

        app.add_exception_handler(kind, handler)

    answer(QuickchangeError, refusal)
    answer(StoreError, lambda error: refusal(from_store(error)))
    answer(RequestValidationError, lambda error: refusal(from_validation(list(error.errors()))))
    answer(HTTPException, _http)


def _http(error: HTTPException) -> Response:
    status = 422 if error.status_code == 400 else error.status_code  # a body that is not JSON
    response = refusal(InvalidRequestError(str(error.detail)), status)
    response.headers.update(error.headers or {})
    return response
