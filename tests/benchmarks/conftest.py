"""A tiny server that answers completions in OpenAI's form, for tests of the load generator."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from quickchange_bench.load.server_process import free_port

TOKEN_SECONDS = 0.002


@dataclass
class FakeServer:
    """What it was asked, and how many it answered at once."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for k in range(body["max_tokens"]):
                await asyncio.sleep(TOKEN_SECONDS)
                yield event({"choices": [{"text": f" {k}", "finish_reason": None}]})
            if body["prompt"] == "break":
                yield event({"error": {"message": "broken"}})
                return
            if body["prompt"] == "end early":
                return
            yield event({"choices": [{"text": "", "finish_reason": "length"}]})
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def make_app(fake: FakeServer) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        fake.bodies.append(body)
        if body["model"] == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        return StreamingResponse(fake.answer(body), media_type="text/event-stream")

    return app


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    port = free_port()
    fake = FakeServer(url=f"http://127.0.0.1:{port}")
    config = uvicorn.Config(make_app(fake), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if time.monotonic() > deadline:
            raise TimeoutError("the fake server did not start")
        time.sleep(0.01)
    yield fake
    server.should_exit = True
    thread.join(timeout=20)
