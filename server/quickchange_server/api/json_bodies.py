"""JSON bodies: bounded while they arrive, parsed and validated off the event loop where large.

A body's parts are counted before anything parses them, so that parsing takes a bounded time and
memory. A route made by `JsonRoute` gets its body validated; its first error is raised where FastAPI
would validate, after the checks of the caller.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from quickchange_server.api.error_responses import from_validation
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.request_base import Refused

# json.loads holds the interpreter, and so the event loop, for 170 ms of each on two busy cores.
MAX_VALUES = 1_000_000  # values in lists and objects, such as token ids
MAX_FIELDS = 50_000  # lists, objects, and the objects' fields
MAX_DEPTH = 256
LARGE = 64 * 1024  # bytes, parsed and validated in about 3 ms

_workers = ThreadPoolExecutor(2, "large-body")  # so many large bodies are parsed at once
_NESTING = bytes(range(256)).translate(None, b"[]{}")  # every byte but the brackets
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class Structure:
    """Counts of a JSON text that arrives in pieces. What stands in strings is not counted."""

    def __init__(self) -> None:
        self._quoted = False  # the piece before ended within a string
        self._rest = b""  # a backslash at the end of the piece before
        self._values = self._fields = self._depth = 0

    def add(self, piece: bytes) -> None:
        """Count one more piece. Raises HTTPException if the text has more than is parsed."""
        piece = self._rest + piece
        piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        self._rest = b"\\" if piece.endswith(b"\\") else b""
        parts = piece.split(b'"')
        outside = b"".join(parts[self._quoted :: 2])
        self._quoted ^= len(parts) % 2 == 0
        self._values += outside.count(b",")
        brackets = outside.translate(None, _NESTING)
        self._fields += sum(map(outside.count, (b":", b"[", b"{")))
        if self._values > MAX_VALUES:
            _refuse(f"{MAX_VALUES} values")
        if self._fields > MAX_FIELDS:
            _refuse(f"{MAX_FIELDS} objects, lists and fields")
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=self._depth))
        self._depth = depths[-1]
        if max(depths) > MAX_DEPTH:
            _refuse(f"{MAX_DEPTH} objects and lists within each other")


def _refuse(most: str) -> None:
    raise HTTPException(400, f"the body has more than {most}; send less")


def parse(content: bytes) -> Any:
    """The JSON value. Raises json.JSONDecodeError, or HTTPException if it is no UTF-8 or has a
    number of thousands of digits."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8; encode it so") from error
    except ValueError as error:
        raise HTTPException(400, "the body holds a number with too many digits") from error


async def parse_large(content: bytes) -> Any:
    """What `parse` gives, off the event loop where the text is large."""
    if len(content) < LARGE:
        return parse(content)
    return await asyncio.get_running_loop().run_in_executor(_workers, parse, content)


class _JsonRequest(Request):
    """A request whose `json` is validated already."""

    def __init__(self, scope: Scope, receive: Receive, kind: TypeAdapter[Any]) -> None:
        super().__init__(scope, receive)
        self._kind = kind

    async def json(self) -> Any:
        content = await self.body()
        if len(content) < LARGE:
            return self._validated(content)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_workers, self._validated, content)

    def _validated(self, content: bytes) -> Any:
        value = parse(content)
        try:
            return self._kind.validate_python(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            return Refused(from_validation(found, value))
        except QuickchangeError as error:
            return Refused(error)


class JsonRoute(APIRoute):
    """A route with its JSON body, if it has one, validated by `_JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        annotation: Any = self.body_field.field_info.annotation
        kind: TypeAdapter[Any] = TypeAdapter(annotation)

        async def handle_checked(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive, kind))

        return handle_checked
