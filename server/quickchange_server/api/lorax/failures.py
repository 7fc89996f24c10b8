"""LoRAX's errors: `{"error", "error_type"}` with its statuses, on its routes alone."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from quickchange_server.api.refusals import (
    ClientGoneError,
    from_store,
    from_validation,
    internal_error,
)
from quickchange_server.api.shapes import Json
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
from quickchange_store.errors import StoreError

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

# The fields under the names that LoRAX has for them; longer names first.
_NAMES = (
    (re.compile(r"\badapters\[(\d+)\]\.id\b"), r"merged_adapters.ids[\1]"),
    (re.compile(r"^adapters: "), "merged_adapters: "),
    (re.compile(r"^model: "), "adapter_id: "),
    (re.compile(r"\bmax_tokens\b"), "max_new_tokens"),
)


def lorax_error(error: QuickchangeError) -> tuple[int, str, str]:
    """An error's status, LoRAX's `error_type` and its message."""
    said = error.message
    for pattern, name in _NAMES:
        said = pattern.sub(name, said)
    match error:
        case InvalidRequestError() | ConflictError():
            return 422, "validation", f"Input validation error: {said}"
        case UnknownModelError() | AdapterFailedError() | RequestFailedError():
            return 424, "generation", f"Request failed during generation: {said}"
        case QueueFullError() | RateLimitedError():
            return 429, "overloaded", f"Model is overloaded: {said}"
        case UnavailableError():
            return 503, "healthcheck", f"unhealthy: {said}"
        case UnauthenticatedError():
            return error.status, "authentication", said
        case ForbiddenError():
            return error.status, "permission", said
        case _:
            return 500, "incomplete_generation", f"Incomplete generation: {said}"


def failure(error: QuickchangeError) -> Json:
    """An error's body, the same in an answer and as a stream's event."""
    _, kind, said = lorax_error(error)
    return {"error": said, "error_type": kind}


def refusal(error: QuickchangeError, status: int | None = None) -> Response:
    """The answer to a request that failed; `status` where HTTP itself has one for it."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    content = json.dumps(failure(error))  # ASCII: it may quote half a surrogate pair
    status = lorax_error(error)[0] if status is None else status
    return Response(content, status, headers=headers, media_type="application/json")


class LoraxRoute(APIRoute):
    """A route whose errors are LoRAX's."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return refusal(from_validation(list(error.errors())))
            except StoreError as error:
                return refusal(from_store(error))
            except QuickchangeError as error:
                return refusal(error)
            except HTTPException as error:
                return refusal(InvalidRequestError(str(error.detail)), error.status_code)
            except ClientGoneError:
                raise
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return refusal(internal_error())

        return answer
