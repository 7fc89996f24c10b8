"""Server-sent events, and work that is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from quickchange_server.api.error_responses import ClientGoneError, error_body, internal_error
from quickchange_server.errors import QuickchangeError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Failure = Callable[[QuickchangeError], Mapping[str, Any]]  # writes an error as an event's body

# json.dumps would make an encoder per event.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no buffering by proxies


def event(body: Any) -> bytes:
    """One event with a JSON body."""
    return b"data: " + _ENCODER.encode(body).encode() + b"\n\n"


def named_event(body: Mapping[str, Any]) -> bytes:
    """One event that is named by its body's type."""
    return b"event: " + str(body["type"]).encode() + b"\n" + event(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client disconnects, cancel it and raise ClientGoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.wait([task, gone])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response of events whose source is closed as soon as the client is gone.

    An error of the source becomes the last event, as `failure` writes it.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        failure: Failure,
        written: Callable[[Any], bytes],
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={**HEADERS, **headers},
        )
        self._first = first
        self._events = events
        self._failure = failure
        self._written = written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()

    async def stream_response(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        body: bytes | None = self._first
        while body is not None:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            try:
                body = await anext(self._events, None)
            except QuickchangeError as error:
                body = self._written(self._failure(error))
            except Exception:
                logger.exception("a stream failed")
                body = self._written(self._failure(internal_error()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    headers: Mapping[str, str],
    failure: Failure = error_body,
    written: Callable[[Any], bytes] = event,
) -> EventStream:
    """A response that streams `events`.

    An error before the first event is raised here, so that it keeps its HTTP status; a later one
    becomes the last event: `failure` gives its body, and `written` makes an event of it.
    """
    first = await unless_gone(request, _first(events))
    return EventStream(first, events, headers, failure, written)


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)
