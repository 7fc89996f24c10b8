"""Streams of a cluster, many at once: what each brought, how long it paused, what it should be."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx
from cluster_harness import wait_until
from llm_models import PIECES

from quickchange_server.entrypoints.llm import LLM
from quickchange_server.protocol import SamplingParams

PROMPT = "select all of it"
LORAS = tuple(f"lora-{number:02}" for number in range(64))  # in the cluster's store


@dataclass(frozen=True)
class Asked:
    """A request with one choice, sampled, so that a token too many or too few changes the rest."""

    adapter: str | None
    seed: int
    tokens: int
    prompt: str = PROMPT

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": self.adapter or "base",
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "temperature": 0.8,
            "seed": self.seed,
            "ignore_eos": True,
            "logprobs": 0,  # names each token, also those that the text doesn't show
        }

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.tokens, temperature=0.8, seed=self.seed, ignore_eos=True
        )


@dataclass(frozen=True)
class Said:
    """A whole answer: its text, its tokens one by one, and how many the server counted."""

    text: str
    tokens: tuple[str, ...]
    counted: int


@dataclass
class Stream:
    """An answer as it arrives. Times are monotonic seconds."""

    asked: Asked
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    pause: float = 0.0  # the longest between two events
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    counted: int = -1
    events: int = 0

    def read(self, http: httpx.Client) -> Stream:
        """Read it to its end. Raises RuntimeError where it is refused or ends with an error."""
        body = {**self.asked.body, "stream": True, "stream_options": {"include_usage": True}}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.read().decode()}")
            done = False
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    self._take(json.loads(line.removeprefix("data: ")))
        if not done:
            raise RuntimeError(f"the stream ended in {self.text!r}")
        return self

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RuntimeError(f"{event['error']} after {len(self.tokens)} tokens")
        if event.get("usage"):
            self.counted = event["usage"]["completion_tokens"]
        now = time.monotonic()
        for choice in event["choices"]:
            self.events += 1
            self.text += choice["text"]
            self.tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
            self.first = self.first or now
            self.pause = max(self.pause, now - (self.last or now))
            self.last = now

    @property
    def said(self) -> Said:
        return Said(self.text, tuple(self.tokens), self.counted)


def expected(single: LLM, asked: Sequence[Asked]) -> list[Said]:
    """What one undisturbed engine says."""
    made = single.generate(
        [one.prompt for one in asked],
        [one.sampling for one in asked],
        adapter=[one.adapter for one in asked],
        use_tqdm=False,
    )
    outputs = [request.outputs[0] for request in made]
    return [Said(o.text, tuple(PIECES[i] for i in o.token_ids), len(o.token_ids)) for o in outputs]


class Streams:
    """Streams that were begun together."""

    def __init__(self, http: httpx.Client, asked: Sequence[Asked]) -> None:
        self.streams = [Stream(one) for one in asked]
        self._pool = ThreadPoolExecutor(len(asked))
        self._read: list[Future[Stream]] = [
            self._pool.submit(stream.read, http) for stream in self.streams
        ]

    def wait_for_tokens(self, count: int) -> None:
        """Wait until each has so many; none may have ended."""
        wait_until(lambda: all(len(stream.tokens) >= count for stream in self.streams))
        assert not any(reading.done() for reading in self._read), "nothing is left to disturb"

    def ended(self) -> list[Stream]:
        """All of them, once they have ended. Raises what a stream raised."""
        with self._pool:
            return [reading.result() for reading in self._read]


@dataclass
class Load:
    """What clients got that ask one after another until they are told to end."""

    answers: list[Stream] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def under_load(http: httpx.Client, asked: Sequence[Asked], clients: int) -> Iterator[Load]:
    """So many clients at work, from before the block until each has ended its last answer."""
    load, stop = Load(), threading.Event()

    def work(number: int) -> None:
        for one in islice(cycle(asked), number, None):
            if stop.is_set():
                return
            try:
                load.answers.append(Stream(one).read(http))
            except (httpx.HTTPError, RuntimeError) as error:
                load.failures.append(f"{one}: {error!r}")
                time.sleep(0.1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: bool(load.answers or load.failures))
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def series(http: httpx.Client, name: str, **labels: str) -> dict[str, float]:
    """The sum of a metric by replica, of those series that have these labels."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").raise_for_status().text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                replica = sample.labels.get("replica", "")
                sums[replica] = sums.get(replica, 0.0) + sample.value
    return sums


def median_of(measure: Callable[[], float], times: int) -> float:
    return sorted(measure() for _ in range(times))[times // 2]


def tell(name: str, **figures: object) -> None:
    """Print a figure; `pytest -rP` or `-s` shows it."""
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
