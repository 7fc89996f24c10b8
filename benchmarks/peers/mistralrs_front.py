"""Loopback HTTP server for the mistralrs wheel, which is a library without one.

Answers `/v1/completions`, streamed. It drives the library's chat call with a template that passes
the prompt through, because the completion call holds the runner until it is done, while the
streaming chat call returns at once and lets requests share batches. Settings come from the
environment, see common.sh. Runs in mistral.rs' own environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mistralrs  # type: ignore[import-not-found]
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

Event = dict[str, Any]


def load_runner(base: str, folder: Path, adapters: int, sequences: int) -> Any:
    common = {"arch": mistralrs.Architecture.Llama, "dtype": mistralrs.ModelDType.F32}
    if adapters:
        loras = [
            mistralrs.LoraAdapter(f"lora-{k}", str(folder / f"lora-{k}")) for k in range(adapters)
        ]
        limits = {"max_adapters": max(adapters, 16), "max_rank": 16}
        which = mistralrs.Which.Lora(model_id=base, adapters=loras, **limits, **common)
    else:
        which = mistralrs.Which.Plain(model_id=base, **common)
    template = str(Path(__file__).with_name("raw.jinja"))
    return mistralrs.Runner(
        which=which, max_seqs=2 * sequences, prefix_cache_n=0, chat_template=template
    )


def completion(runner: Any, lock: threading.Lock, body: Event) -> Iterator[Event]:
    """Yield the answer's events as they come."""
    adapters = body.get("adapters")
    request = mistralrs.ChatCompletionRequest(
        messages=[{"role": "user", "content": body["prompt"]}],
        model="default",
        max_tokens=body["max_tokens"],
        temperature=0.0,
        top_k=1,
        stream=True,
        ignore_eos=bool(body.get("ignore_eos")),
        adapter=adapters[0] if adapters else None,
    )
    with lock:  # the runner takes one call at a time; the answers run together
        chunks = runner.send_chat_completion_request(request)
    for chunk in chunks:
        choice = chunk.choices[0]
        event: Event = {
            "choices": [{"text": choice.delta.content or "", "finish_reason": choice.finish_reason}]
        }
        if usage := getattr(chunk, "usage", None):
            event["usage"] = {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }
        yield event


def make_app(runner: Any, threads: int) -> FastAPI:
    app = FastAPI()
    pool = ThreadPoolExecutor(threads)
    lock = threading.Lock()

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
                for event in completion(runner, lock, body):
                    put(event)
            except BaseException as error:  # the library's panics are not Exceptions
                put({"error": f"{type(error).__name__}: {error}"})
            put(None)

        async def stream() -> AsyncIterator[str]:
            while (event := await events.get()) is not None:
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        pool.submit(work)
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def main() -> None:
    sequences = int(os.environ["SEQUENCES"])
    runner = load_runner(
        os.environ["BASE_MODEL"],
        Path(os.environ["ADAPTERS_DIR"]),
        int(os.environ["ADAPTERS"]),
        sequences,
    )
    port = int(os.environ["PORT"])
    uvicorn.run(make_app(runner, 2 * sequences), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
