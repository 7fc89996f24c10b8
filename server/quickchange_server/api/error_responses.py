"""Error responses in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`.

All routes use them, validation included, except where another API's `Surface` has a form of its
own. Messages reveal nothing of the server's internals.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from quickchange_server.config import local_folder
from quickchange_server.errors import (
    ConflictError,
    EngineFailedError,
    InvalidRequestError,
    QuickchangeError,
    StorageFullError,
    UnavailableError,
    UnknownModelError,
    UnsupportedParameterError,
)
from quickchange_server.frontend.request_base import UNKNOWN, UNSUPPORTED
from quickchange_server.observability.naming.request_ids import current
from quickchange_store.errors import (
    AdapterNotFoundError,
    CorruptStoreError,
    NameConflictError,
    SourceUnavailableError,
    StoreError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

_SOURCES = ("body", "query", "path")  # where pydantic's names of places begin
STORE_RETRY_SECONDS = 5.0
MOST_SAID = 2_000  # characters of a message, which may quote what the client sent
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it


class ClientGoneError(Exception):
    """The client closed the connection before the answer."""


@dataclass(frozen=True)
class Surface:
    """The requests of another API than OpenAI's, and its form of errors."""

    covers: Callable[[Request], bool]
    refusal: Callable[[Request, QuickchangeError, int | None], Response]  # int: the status, if set


def error_body(error: QuickchangeError) -> dict[str, Any]:
    """OpenAI's error object for an error."""
    return {
        "error": {
            "message": shortened(error.message),
            "type": error.kind,
            "param": None if error.param is None else shortened(error.param),
            "code": error.code,
        }
    }


def shortened(text: str) -> str:
    """The text with its middle left out if it is very long."""
    if len(text) <= MOST_SAID:
        return text
    return f"{text[: MOST_SAID // 2]} ... {text[-MOST_SAID // 2 :]}"


def error_response(error: QuickchangeError, status: int | None = None) -> Response:
    """The response for an error; `status` overrides its own."""
    return refusal_response(error_body(error), error, status or error.status)


def refusal_response(body: Mapping[str, Any], error: QuickchangeError, status: int) -> Response:
    """A response with an error's body, and when to come again."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    # ASCII only: a message may quote lone surrogates from the client's body.
    return Response(json.dumps(body), status, headers=headers, media_type="application/json")


def refused(request: Request, error: QuickchangeError, status: int | None = None) -> Response:
    """The answer to an error, in the form of the API that the request is of."""
    surfaces: Sequence[Surface] = request.app.state.surfaces
    for surface in surfaces:
        if surface.covers(request):
            return surface.refusal(request, error, status)
    return error_response(error, status)


def from_store(error: StoreError) -> QuickchangeError:
    """The client's error for an error of the store."""
    match error:
        case AdapterNotFoundError(remedy=str(remedy)) if "`quickchange" in remedy:
            there = "GET /v1/adapters lists what there is"  # a command is the operator's
            return UnknownModelError(f"{error.key}: {error.problem}; {there}")
        case AdapterNotFoundError():
            return UnknownModelError(str(error))
        case NameConflictError():
            return ConflictError(str(error))
        case StoreUnavailableError():
            logger.error("the store is away: %s", error)
            return UnavailableError(
                "the adapter store can't be reached: nothing is known to have changed; send the "
                "request again",
                retry_after=STORE_RETRY_SECONDS,
            )
        case SourceUnavailableError():
            return UnavailableError(str(error), retry_after=STORE_RETRY_SECONDS)
        case CorruptStoreError():
            logger.error("the store is damaged: %s", error)
            return EngineFailedError(str(error))
        case _:
            return InvalidRequestError(str(error))


def from_system(error: OSError, store: Path) -> QuickchangeError | None:
    """The client's error where the server can't write its files; None for other errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        logger.error("a disk is full: %s", error)
        place = Path(os.fsdecode(error.filename)) if error.filename else store
        there = next(folder for folder in (place, *place.parents, store) if folder.exists())
        return StorageFullError(
            "the server's disk is full: nothing was changed, and "
            f"{disk_usage(there).free / 2**20:,.1f} MiB are free. Remove adapters that nobody "
            "needs, and have the server's operator run `quickchange adapters gc` or add space"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        logger.error("the server can't write its files: %s", error)
        return QuickchangeError(
            f"the server can't write its files: {os.strerror(error.errno)}; its operator finds the "
            "file in the log"
        )
    return None


def from_validation(errors: list[Any], body: Any = None) -> InvalidRequestError:
    """The client's error for the first of pydantic's errors, by the field's name.

    `body`: what was validated, if it is known; without it a union's branches are in the name.
    """
    first = _informative(errors, body)
    kind = str(first["type"])
    if kind == "json_invalid":
        where = first["loc"][-1]
        return InvalidRequestError(
            f"the body is not valid JSON: {first['ctx']['error']} at character {where}"
        )
    param = _param(first, body)
    if param is None:
        return InvalidRequestError(
            "the body must be a JSON object, sent with Content-Type: application/json"
        )
    if kind == UNSUPPORTED:
        return UnsupportedParameterError(f"{param}: {first['msg']}", param=param)
    if kind == UNKNOWN:
        return UnsupportedParameterError(
            f"{param}: unknown field; {first['ctx']['remedy']} docs/http.md lists what each route "
            "takes",
            param=param,
        )
    return InvalidRequestError(f"{param}: {_sentence(first)}", param=param)


def _informative(errors: Sequence[Mapping[str, Any]], body: Any) -> Mapping[str, Any]:
    """The first error, or the deepest at the same place: that of the union's branch that was
    meant."""
    if body is None:
        return errors[0]
    place = _path(errors[0], body)
    same = [each for each in errors if _path(each, body)[: len(place)] == place]
    return max(same, key=lambda each: len(_path(each, body)))


def _path(finding: Mapping[str, Any], body: Any) -> list[str | int]:
    """The wrong field's place in the body, without pydantic's own names of a union's branches."""
    path: list[str | int] = []
    value, parts = body, [part for part in finding["loc"] if part not in _SOURCES]
    if body is None:
        path = parts
    else:
        for part in parts:
            inside = isinstance(value, dict) and part in value
            if inside or (isinstance(value, list) and isinstance(part, int)):
                value = value[part]
                path.append(part)
            elif finding["type"] == "missing" and part is parts[-1]:
                path.append(part)
    field = finding.get("ctx", {}).get("field")
    return path if field is None else [*path, field]


def _param(finding: Mapping[str, Any], body: Any) -> str | None:
    """The wrong field's path, such as `messages[0].content`; None for the body itself."""
    shown = ""
    for part in _path(finding, body):
        shown += f"[{part}]" if isinstance(part, int) else f".{part}"
    return shown.removeprefix(".") or None


def _sentence(finding: Mapping[str, Any]) -> str:
    match finding["type"]:
        case "missing":
            return "is required"
        case "too_long" if "max_length" in finding.get("ctx", {}):
            return f"has more than {finding['ctx']['max_length']} items; send fewer"
    message = str(finding["msg"])
    plain = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return plain.replace("String should ", "must ")


def install(app: FastAPI, *surfaces: Surface) -> None:
    """Register handlers that answer every error in the form of its surface, or else OpenAI's."""
    app.state.surfaces = surfaces

    @app.exception_handler(QuickchangeError)
    async def quickchange(request: Request, error: QuickchangeError) -> Response:
        return refused(request, error)

    @app.exception_handler(StoreError)
    async def store(request: Request, error: StoreError) -> Response:
        return refused(request, from_store(error))

    @app.exception_handler(OSError)
    async def system(request: Request, error: OSError) -> Response:
        answered = from_system(error, local_folder(request.app.state.services.settings.store))
        if answered is None:
            raise error
        return refused(request, answered)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return refused(request, from_validation(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = refused(request, InvalidRequestError(message), error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGoneError)
    async def gone(_request: Request, _error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the access log alone


def internal_error() -> QuickchangeError:
    """The client's error for an unforeseen exception, which the log describes."""
    about = f" of the request {request}" if (request := current()) else ""
    return QuickchangeError(f"internal error; the server's log has the details{about}")
