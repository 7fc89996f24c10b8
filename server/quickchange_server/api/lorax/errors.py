"""Errors in LoRAX's form, `{"error", "error_type"}` with its statuses, on its routes alone."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from quickchange_server.api.error_responses import refusal_response
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

# LoRAX's names of the fields that messages mention; longer names first.
_NAMES = (
    (re.compile(r"\badapters\[(\d+)\]\.id\b"), r"merged_adapters.ids[\1]"),
    (re.compile(r"^adapters: "), "merged_adapters: "),
    (re.compile(r"^model: "), "adapter_id: "),
    (re.compile(r"\bmax_tokens\b"), "max_new_tokens"),
    (re.compile(r"\bresponse_format\.json_schema\.schema\b"), "response_format.schema"),
    (re.compile(r"\bguided_(json|regex)\b"), "grammar.value"),
)


def paths_of(*routers: APIRouter) -> frozenset[str]:
    """The paths whose errors have LoRAX's form."""
    return frozenset(
        route.path for router in routers for route in router.routes if isinstance(route, APIRoute)
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


def refusal(_request: Request, error: QuickchangeError, status: int | None = None) -> Response:
    """The response to a failed request. `status` overrides LoRAX's, but for a wrong body."""
    status = lorax_error(error)[0] if status in (None, 400) else status
    return refusal_response(failure(error), error, status)
