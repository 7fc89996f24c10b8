"""Error responses in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`.

All routes use them, validation included, except where `lorax/errors.py` has LoRAX's form. Messages
reveal nothing of the server's internals.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from quickchange_server.errors import (
    ConflictError,
    EngineFailedError,
    InvalidRequestError,
    QuickchangeError,
    UnknownModelError,
    UnsupportedParameterError,
)
from quickchange_server.frontend.request_base import UNSUPPORTED
from quickchange_store.errors import (
    AdapterNotFoundError,
    CorruptStoreError,
    NameConflictError,
    StoreError,
)

logger = logging.getLogger(__name__)

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it


class ClientGoneError(Exception):
    """The client closed the connection before the answer."""


def error_body(error: QuickchangeError) -> dict[str, Any]:
    """OpenAI's error object for an error."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: QuickchangeError, status: int | None = None) -> Response:
    """The response for an error; `status` overrides its own."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return _response(error_body(error), status or error.status, headers)


def _response(body: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> Response:
    # ASCII only: a message may quote lone surrogates from the client's body.
    return Response(json.dumps(body), status, headers=dict(headers), media_type="application/json")


def from_store(error: StoreError) -> QuickchangeError:
    """The client's error for an error of the store."""
    match error:
        case AdapterNotFoundError():
            return UnknownModelError(str(error))
        case NameConflictError():
            return ConflictError(str(error))
        case CorruptStoreError():
            logger.error("the store is damaged: %s", error)
            return EngineFailedError(str(error))
        case _:
            return InvalidRequestError(str(error))


def from_validation(errors: list[Any]) -> InvalidRequestError:
    """The client's error for the first of pydantic's errors, by the field's name."""
    first: Mapping[str, Any] = errors[0]
    kind = str(first["type"])
    if kind == "json_invalid":
        where = first["loc"][-1]
        return InvalidRequestError(
            f"the body is not valid JSON: {first['ctx']['error']} at character {where}"
        )
    param = _param(first)
    if param is None:
        return InvalidRequestError(
            "the body must be a JSON object, sent with Content-Type: application/json"
        )
    if kind == UNSUPPORTED:
        return UnsupportedParameterError(f"{param}: {first['msg']}", param=param)
    if kind == "extra_forbidden":
        return UnsupportedParameterError(
            f"{param}: unknown field; remove it (docs/http.md lists what each route takes)",
            param=param,
        )
    return InvalidRequestError(f"{param}: {_sentence(kind, str(first['msg']))}", param=param)


def _param(finding: Mapping[str, Any]) -> str | None:
    """The wrong field's path, such as `messages[0].content`; None for the body itself."""
    path = [part for part in finding["loc"] if part not in ("body", "query", "path")]
    field = finding.get("ctx", {}).get("field")
    if field is not None:
        path.append(field)
    shown = ""
    for part in path:
        shown += f"[{part}]" if isinstance(part, int) else f".{part}"
    return shown.removeprefix(".") or None


def _sentence(kind: str, message: str) -> str:
    if kind == "missing":
        return "is required"
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def install(app: FastAPI) -> None:
    """Register handlers that answer every error of the application in OpenAI's form."""

    @app.exception_handler(QuickchangeError)
    async def quickchange(_request: Request, error: QuickchangeError) -> Response:
        return error_response(error)

    @app.exception_handler(StoreError)
    async def store(_request: Request, error: StoreError) -> Response:
        return error_response(from_store(error))

    @app.exception_handler(RequestValidationError)
    async def validation(_request: Request, error: RequestValidationError) -> Response:
        return error_response(from_validation(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        refused = InvalidRequestError(message)
        response = error_response(refused, error.status_code)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_methods(app, request))
        return response

    @app.exception_handler(ClientGoneError)
    async def gone(_request: Request, _error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the access log alone


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Methods of a path; Starlette's own list has those of the first matching route alone."""
    asked = ({**request.scope, "method": method} for method in _METHODS)
    return [
        scope["method"]
        for scope in asked
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)
    ]


def internal_error() -> QuickchangeError:
    """The client's error for an unforeseen exception, which the log describes."""
    return QuickchangeError("internal error; the server's log has the details")
