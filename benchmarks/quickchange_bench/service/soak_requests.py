"""Requests of the soak, of every kind, and their answers as a client reads them."""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import httpx

from quickchange_bench.load.load_client import Body, bearer
from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.workload import Uniform, Workload

EXPERIMENT, ALIAS = "soak-trial", "soak-alias"
USERS = tuple(f"user {k}" for k in range(8))  # of the experiment, its variants by turns
ROUNDING = 1e-6  # by which an embedding of unit length may differ
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class SoakAsk:
    """One request of the pool. `names`: the adapters that it needs."""

    index: int
    path: str
    body: Body
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SoakAnswer:
    """An answer as far as it was read. `texts` and `reasons` by choice; times on the client's
    clock."""

    status: int
    texts: tuple[str, ...] = ()
    reasons: tuple[str | None, ...] = ()
    tokens: int | None = None  # None: the reader left before the end
    error: str | None = None
    gap: float = 0.0  # the longest silence within the answer, in seconds
    started: float = 0.0
    ended: float = 0.0
    vector: tuple[float, ...] = ()  # of an embedding

    def fault(self, reference: SoakAnswer) -> str | None:
        """What is wrong with it beside the undisturbed answer, in words; None if nothing."""
        if self.status != 200 or self.error is not None:
            return f"status {self.status}: {self.error}"
        if self.tokens is None:
            pairs = zip(self.texts, reference.texts, strict=False)
            return None if all(whole.startswith(part) for part, whole in pairs) else "other text"
        numbers = zip(self.vector, reference.vector, strict=True)
        if not all(isclose(one, other, abs_tol=ROUNDING) for one, other in numbers):
            return "another embedding"
        if self.texts != reference.texts:
            return f"other text: {self.texts!r}, not {reference.texts!r}"
        mine, whole = (self.tokens, self.reasons), (reference.tokens, reference.reasons)
        if mine != whole:
            return f"other ends: {mine}, not {whole}"
        return None


def make_pool(base: str, adapters: Sequence[str], count: int, seed: int) -> list[SoakAsk]:
    """`count` requests of all kinds in turn, their adapters Zipf-popular."""
    popularity = Popularity("zipf", len(adapters), seed)
    workload = Workload(Uniform(8, 64), Uniform(4, 48), popularity, seed)
    kinds = list(KINDS)
    pool = []
    for index in range(count):
        request, rng = workload.request(index), random.Random(f"soak {seed} {index}")
        assert request.adapter is not None
        name, other = adapters[request.adapter], rng.choice(adapters)
        body: Body = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **rng.choice(({"temperature": 0}, {"temperature": 0.8, "seed": index, "top_k": 40})),
        }
        path, changed, names = KINDS[kinds[index % len(kinds)]](base, name, other, body)
        pool.append(SoakAsk(index, path, changed, names))
    return pool


Made = tuple[str, Body, tuple[str, ...]]
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"


def _chat(body: Body) -> Body:
    rest = {key: value for key, value in body.items() if key != "prompt"}
    return {**rest, "messages": [{"role": "user", "content": body["prompt"]}]}


def _mixed(base: str, name: str, other: str, body: Body) -> Made:
    terms = [{"id": name, "weight": 0.7}, {"id": other, "weight": 0.4}]
    if name == other:
        terms = terms[:1]
    return _COMPLETIONS, {**body, "model": base, "adapters": terms}, (name, other)


def _structured(_base: str, name: str, _other: str, body: Body) -> Made:
    wanted = {"name": "order", "schema": SCHEMA}
    form = {"type": "json_schema", "json_schema": wanted}
    return _CHAT, {**_chat(body), "model": name, "max_tokens": 64, "response_format": form}, (name,)


def _experiment(_base: str, name: str, _other: str, body: Body) -> Made:
    user = USERS[zlib.crc32(name.encode()) % len(USERS)]
    return _CHAT, {**_chat(body), "model": EXPERIMENT, "user": user}, ()


def _embedding(_base: str, name: str, _other: str, body: Body) -> Made:
    return "/v1/embeddings", {"model": name, "input": body["prompt"]}, (name,)


KINDS: Mapping[str, Callable[[str, str, str, Body], Made]] = {
    "adapter": lambda _base, name, _other, body: (_COMPLETIONS, {**body, "model": name}, (name,)),
    "mix": _mixed,
    "structured": _structured,
    "lookup": lambda _base, name, _other, body: (
        *(_COMPLETIONS, {**body, "model": name, "turbo": "lookup"}),
        (name,),
    ),
    "experiment": _experiment,
    "base": lambda base, _name, _other, body: (_COMPLETIONS, {**body, "model": base}, ()),
    "choices": lambda _base, name, _other, body: (
        *(_COMPLETIONS, {**body, "model": name, "n": 2, "temperature": 0.9, "seed": 7}),
        (name,),
    ),
    "alias": lambda _base, _name, _other, body: (_COMPLETIONS, {**body, "model": ALIAS}, ()),
    "embedding": _embedding,
}


async def ask(
    http: httpx.AsyncClient, wanted: SoakAsk, key: str, leave_after: int | None = None
) -> SoakAnswer:
    """Send a request and read its answer, or its first `leave_after` events."""
    started = time.monotonic()
    reader = _Reader(started)
    try:
        async with http.stream(
            "POST", wanted.path, json=wanted.body, headers=bearer(key)
        ) as response:
            if response.status_code != 200 or not wanted.body.get("stream"):
                return _whole(response.status_code, await response.aread(), started)
            async for line in response.aiter_lines():
                if line.startswith("data: ") and not reader.take(line.removeprefix("data: ")):
                    break
                if leave_after is not None and reader.events >= leave_after:
                    break
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        reader.error = f"{type(error).__name__}: {error}"
    return reader.answer(left=leave_after is not None)


def _whole(status: int, content: bytes, started: float) -> SoakAnswer:
    text = content.decode(errors="replace")
    if status != 200:
        return SoakAnswer(status, error=text[:300], started=started, ended=time.monotonic())
    body = json.loads(text)
    return SoakAnswer(
        status,
        tokens=body["usage"]["prompt_tokens"],
        started=started,
        ended=time.monotonic(),
        vector=tuple(body["data"][0]["embedding"]),
    )


class _Reader:
    """Collects a stream's events."""

    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self._texts: dict[int, str] = {}
        self._reasons: dict[int, str] = {}
        self._usage: Body | None = None
        self._gap = 0.0
        self._done = False
        self.events = 0
        self.error: str | None = None

    def take(self, data: str) -> bool:
        """Read one event. Returns False at the end of the stream."""
        now = time.monotonic()
        self._gap, self._last = max(self._gap, now - self._last), now
        self.events += 1
        if data == "[DONE]":
            self._done = True
            return False
        event: Body = json.loads(data)
        if "error" in event:
            self.error = json.dumps(event["error"])[:300]
            return False
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._choice(choice)
        return True

    def _choice(self, choice: Mapping[str, Any]) -> None:
        index = choice["index"]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        self._texts[index] = self._texts.get(index, "") + text
        if choice.get("finish_reason"):
            self._reasons[index] = choice["finish_reason"]

    def answer(self, *, left: bool) -> SoakAnswer:
        """What was read. `left`: the reader meant to leave before the end."""
        if not self._done and not left and self.error is None:
            self.error = "the stream ended without [DONE]"
        order = sorted(self._texts)
        usage = self._usage if self._done else None
        return SoakAnswer(
            status=200,
            texts=tuple(self._texts[index] for index in order),
            reasons=tuple(self._reasons.get(index) for index in order),
            tokens=None if usage is None else usage["completion_tokens"],
            error=self.error,
            gap=self._gap,
            started=self._started,
            ended=time.monotonic(),
        )
