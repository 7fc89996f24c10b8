"""Loopback HTTP server for openvino-genai, which is a library without one.

A thread steps its continuous-batching pipeline and hands each request its tokens. It serves no
adapters: all requests of its batch share one, so its best is one adapter merged into the weights,
which costs nothing; the base model's speed is that ceiling. Settings come from the environment, see
common.sh. Runs in openvino-genai's own environment.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openvino_genai  # type: ignore[import-not-found]
from completions_front import Event, serve

RUNNING = openvino_genai.GenerationStatus.RUNNING
LET_OTHERS = 0.0002  # s after each step, in which its tokens go out


def load_pipeline(model: str, precision: str, sequences: int, context: int) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = sequences
    scheduler.num_kv_blocks = sequences * (context // 32 + 2)  # of 32 tokens
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": "f16",  # the other peers' too
        "INFERENCE_NUM_THREADS": int(os.environ["THREADS"]),
    }
    return openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties, {})


@dataclass
class StepThread:
    """A pipeline and the thread that steps it while there are requests."""

    pipeline: Any
    tokenizer: Any = field(init=False)
    lock: threading.Condition = field(default_factory=threading.Condition)
    waiting: list[tuple[Any, Any, queue.Queue[list[int] | None]]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = self.pipeline.get_tokenizer()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: Any, config: Any) -> queue.Queue[list[int] | None]:
        """A queue of the tokens as they come, None at the end."""
        tokens: queue.Queue[list[int] | None] = queue.Queue()
        with self.lock:
            self.waiting.append((prompt, config, tokens))
            self.lock.notify()
        return tokens

    def _run(self) -> None:
        running: list[tuple[Any, queue.Queue[list[int] | None]]] = []
        while True:
            with self.lock:
                while not self.waiting and not running:
                    self.lock.wait()
                arrived, self.waiting = self.waiting, []
            for prompt, config, tokens in arrived:
                running.append((self.pipeline.add_request(self.count, prompt, config), tokens))
                self.count += 1
            self.pipeline.step()  # holds Python's lock
            time.sleep(LET_OTHERS)
            for handle, tokens in running:
                while handle.can_read():
                    tokens.put([t for out in handle.read().values() for t in out.generated_ids])
            ended = [pair for pair in running if pair[0].get_status() != RUNNING]
            running = [pair for pair in running if pair[0].get_status() == RUNNING]
            for _, tokens in ended:
                tokens.put(None)

    def completion(self, body: Event) -> Iterator[Event]:
        """Yield the answer's events as they come."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = body["max_tokens"]
        config.do_sample = False
        config.ignore_eos = bool(body.get("ignore_eos"))
        prompt = self.tokenizer.encode(body["prompt"]).input_ids
        tokens = self.submit(prompt, config)
        answer: list[int] = []
        text = ""
        while (more := tokens.get()) is not None:
            answer += more
            whole = self.tokenizer.decode(answer)
            yield {"choices": [{"text": whole[len(text) :], "finish_reason": None}]}
            text = whole
        usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": len(answer)}
        yield {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage}


def main() -> None:
    sequences = int(os.environ["SEQUENCES"])
    pipeline = load_pipeline(
        os.environ["OPENVINO_MODEL"],
        os.environ["OPENVINO_PRECISION"],
        sequences,
        int(os.environ["CONTEXT"]),
    )
    serve(StepThread(pipeline).completion, sequences)


if __name__ == "__main__":
    main()
