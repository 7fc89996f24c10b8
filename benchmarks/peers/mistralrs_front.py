"""Loopback HTTP server for the mistralrs wheel, which is a library without one.

It drives the library's chat call with a template that passes
the prompt through, because the completion call holds the runner until it is done, while the
streaming chat call returns at once and lets requests share batches. Settings come from the
environment, see common.sh. Runs in mistral.rs' own environment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mistralrs  # type: ignore[import-not-found]
from completions_front import Event, serve


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


def main() -> None:
    sequences = int(os.environ["SEQUENCES"])
    runner = load_runner(
        os.environ["BASE_MODEL"],
        Path(os.environ["ADAPTERS_DIR"]),
        int(os.environ["ADAPTERS"]),
        sequences,
    )
    serve(partial(completion, runner, threading.Lock()), sequences)


if __name__ == "__main__":
    main()
