"""HTTP before a library that has no server of its own: `/v1/completions`, streamed.

Runs in the peer's own environment, with fastapi and uvicorn.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

Event = dict[str, Any]


def serve(completion: Callable[[Event], Iterator[Event]], sequences: int) -> None:
    """Serve until the process ends, on PORT; `completion` yields a body's events as they come."""
    app = make_app(completion, threads=2 * sequences)
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")


def make_app(completion: Callable[[Event], Iterator[Event]], threads: int) -> FastAPI:
    app = FastAPI()
    pool = ThreadPoolExecutor(threads)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def put(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                for event in completion(body):
                    put(event)
            except BaseException as error:  # a library's panics are not Exceptions
                put({"error": f"{type(error).__name__}: {error}"})
            put(None)

        async def stream() -> AsyncIterator[str]:
            while (event := await events.get()) is not None:
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        pool.submit(work)
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app
