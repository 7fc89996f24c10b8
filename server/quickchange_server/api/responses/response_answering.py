"""One response from its first token to its end: whole, streamed, cancelled, and kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count

from quickchange_server.api.responses.response_context import Context
from quickchange_server.api.responses.response_events import OutputWriter
from quickchange_server.api.responses.response_objects import ResponseObject, Status
from quickchange_server.api.sse import event
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.output_processor import Ending, Piece
from quickchange_server.frontend.request_base import Json
from quickchange_server.storage.responses.stored_responses import Kept, StoredResponses
from quickchange_server.storage.responses.tables_responses import Owner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where a response is kept: the store, for whom, and with what it was given."""

    store: StoredResponses
    owner: Owner
    context: Context


@dataclass
class ResponseWork:
    """A response under way."""

    object: ResponseObject
    writer: OutputWriter
    keeping: Keeping | None  # None: it is not stored
    _numbers: Iterator[int] = field(default_factory=count)
    _ending: Ending | None = None
    _cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    _last: list[Json] = field(default_factory=list)  # events that a cancellation makes

    @property
    def id(self) -> str:
        return self.object.chat.generation.account.opened.request_id

    def so_far(self) -> Json:
        """The response as it is now."""
        return self._told("in_progress")

    async def cancel(self) -> Json:
        """End what still runs. Returns the response, which is kept."""
        self._leave()
        self._last = list(self.writer.cut())
        self._cancelled.set()
        self.object.chat.generation.close()
        return await self._keep(self._told("cancelled"))

    async def whole(self) -> Json:
        """The whole response."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                for _ in self._push(piece):
                    pass
        return await self._completed()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events. Raises what ends it before its first token."""
        begun = False
        if self.keeping is not None:
            self.keeping.store.begin(self.keeping.owner, self.id, self)
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if not begun:
                        begun = True
                        yield self._life("created", self.so_far())
                        yield self._life("in_progress", self.so_far())
                    for told in self._push(piece):
                        yield self._numbered(told)
        except QuickchangeError as error:
            self._leave()
            if not begun:
                raise
            for told in self.writer.cut():
                yield self._numbered(told)
            yield self._life("failed", await self._keep(self._told("failed", error)))
            return
        finally:
            self._leave()
        if self._cancelled.is_set():
            for told in self._last:
                yield self._numbered(told)
            yield self._life("incomplete", self._told("cancelled"))
        else:
            response = await self._completed()
            yield self._life(response["status"], response)

    def _leave(self) -> None:
        """From here on it can't be cancelled."""
        if self.keeping is not None:
            self.keeping.store.end(self.keeping.owner, self.id)

    def failure(self, error: QuickchangeError) -> Json:
        """The event that ends a stream which nothing else could."""
        told = {"code": error.code, "message": error.message, "param": error.param}
        return {"type": "error", "sequence_number": next(self._numbers), **told}

    def _push(self, piece: Piece) -> Iterator[Json]:
        self._ending = piece.ending
        return self.writer.push(piece)

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer, up to its end or its cancellation."""
        async with aclosing(self.object.chat.generation.pieces()) as pieces:
            if self.keeping is None:  # nobody can cancel it
                async for _, piece in pieces:
                    yield piece
                return
            cancelled = asyncio.ensure_future(self._cancelled.wait())
            try:
                while True:
                    step = asyncio.ensure_future(anext(pieces, None))
                    try:
                        await asyncio.wait([step, cancelled], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        if not step.done():
                            step.cancel()
                            await asyncio.wait([step])
                    if cancelled.done():
                        return
                    found = step.result()
                    if found is None:
                        return
                    yield found[1]
            finally:
                cancelled.cancel()

    async def _completed(self) -> Json:
        """The finished response, once it is kept and its records are on the disk."""
        response = await self._keep(
            self._told("incomplete" if self._ending == "length" else "completed")
        )
        await self.object.chat.generation.account.settled()
        return response

    async def _keep(self, response: Json) -> Json:
        """The response, stored where it is to be; it says so itself if that failed."""
        if self.keeping is None:
            return response
        context = self.keeping.context
        kept = Kept(response, context.stored_input(self.id))
        try:
            await self.keeping.store.keep(self.keeping.owner, kept, continued=context.continued)
        except QuickchangeError as error:
            logger.error("the response %s could not be stored: %s", self.id, error)
            return {**response, "store": False}
        return response

    def _told(self, status: Status, error: QuickchangeError | None = None) -> Json:
        return self.object.told(
            status,
            self.writer.items,
            reasoning_spans=self.writer.reasoning_spans,
            error=error,
            completed_at=time.time() if status == "completed" else None,
        )

    def _life(self, name: str, response: Json) -> bytes:
        return self._numbered({"type": f"response.{name}", "response": response})

    def _numbered(self, told: Json) -> bytes:
        kind = told["type"]
        numbered = {"type": kind, "sequence_number": next(self._numbers), **told}
        return f"event: {kind}\n".encode() + event(numbered)
