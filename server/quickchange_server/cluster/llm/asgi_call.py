"""A call of an ASGI application inside this process, whose answer is read as it comes.

Whoever stops reading is, for the application, a client that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

UNREAD = 64  # parts of an answer that wait for their reader, before the application waits


@dataclass(frozen=True)
class AsgiAnswer:
    """An answer whose body is still being made."""

    status: int
    headers: Headers
    parts: AsyncIterator[bytes]

    @property
    def streams(self) -> bool:
        """True for server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts])


@asynccontextmanager
async def asgi_call(
    app: ASGIApp, path: str, body: bytes, headers: Mapping[str, str]
) -> AsyncIterator[AsgiAnswer]:
    """POST a JSON body. At the context's end what still runs of the request is cancelled.

    Raises what the application raises.
    """
    gone = asyncio.Event()
    said: asyncio.Queue[Message] = asyncio.Queue(UNREAD)
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in asked:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    call: Any = app(_scope(path, body, headers), receive, said.put)
    work: asyncio.Task[None] = asyncio.create_task(call)
    try:
        start = await _next(said, work)
        yield AsgiAnswer(start["status"], Headers(raw=start["headers"]), _parts(said, work))
    finally:
        gone.set()
        if not work.done():
            work.cancel()
        await asyncio.wait([work])


def _scope(path: str, body: bytes, headers: Mapping[str, str]) -> Scope:
    told = {
        **{name.lower(): value for name, value in headers.items()},
        "content-type": "application/json",
        "content-length": str(len(body)),
    }
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in told.items()],
        "client": None,
        "server": None,
    }


async def _next(said: asyncio.Queue[Message], work: asyncio.Task[None]) -> Message:
    """The application's next message. Raises what ended the application without one."""
    if said.empty() and not work.done():
        message = asyncio.ensure_future(said.get())
        try:
            await asyncio.wait([message, work], return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return message.result()
        finally:
            message.cancel()
    if said.empty():
        work.result()
        raise RuntimeError("the application ended without an answer")
    return said.get_nowait()


async def _parts(said: asyncio.Queue[Message], work: asyncio.Task[None]) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await _next(said, work)
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]
