"""Structured output over HTTP: validity of answers, equality with drafts, speed.

Two parts on one server of the demo. Answers: generations over ten schemas, on the base and on an
adapter with Turbo by turns, sampled, each with drafts on and off under one seed; each is judged by
the jsonschema library. Speed: closed loops of the same requests, constrained and not; the free ones
are as long as the constrained ones were, so both generate as many tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import jsonschema

from quickchange_bench.load import own_server
from quickchange_bench.report_tables import number, table
from quickchange_bench.service.structured_schemas import CASES, SchemaCase

_SECONDS = 900.0  # for one answer
_TOGETHER = 16  # generations of the first part
_WARMUP = 4
ADAPTER = "order-json-turbo"


@dataclass(frozen=True, slots=True)
class StructuredOptions:
    """Options of the run. `store` None: a new one with the demo's adapters."""

    model: Path
    store: str | None = None
    generations: int = 200
    first: int = 0  # seed of the first; the others' follow
    concurrency: tuple[int, ...] = (1, 8, 16)
    requests_per_worker: int = 2
    max_tokens: int = 384
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class StructuredRequest:
    """One request."""

    case: SchemaCase
    model: str
    seed: int
    turbo: str = "off"
    temperature: float = 0.8
    free_tokens: int | None = None  # length without a constraint; None: constrained

    def body(self, max_tokens: int) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.case.prompt}],
            "seed": self.seed,
            "temperature": self.temperature,
            "turbo": self.turbo,
        }
        if self.free_tokens is not None:
            return {**wanted, "max_tokens": self.free_tokens, "ignore_eos": True}
        schema = {"name": self.case.name, "schema": self.case.schema, "strict": True}
        form = {"type": "json_schema", "json_schema": schema}
        return {**wanted, "max_tokens": max_tokens, "response_format": form}


@dataclass(frozen=True, slots=True)
class StructuredAnswer:
    text: str
    tokens: int
    accepted: int  # tokens that came from drafts


@dataclass(frozen=True, slots=True)
class StructuredSpeed:
    """Tokens per second at one number of workers."""

    workers: int
    free: float
    constrained: float
    constrained_turbo: float


@dataclass(frozen=True, slots=True)
class StructuredResult:
    generations: int
    invalid: tuple[str, ...]  # "schema: why"
    different: int  # pairs whose texts with and without drafts differ
    accepted_share: float  # share of tokens from drafts, with drafts on
    speeds: tuple[StructuredSpeed, ...]


def measure_structured(
    options: StructuredOptions, progress: Callable[[str], None]
) -> StructuredResult:
    """Measure both parts; `generations` or `concurrency` of none leaves one out."""
    with TemporaryDirectory(prefix="quickchange-structured-") as folder:
        store = options.store or _demo_store(Path(folder) / "store", options.model)
        # equal prompts come again: each must be computed
        environment = {"QUICKCHANGE_PREFIX_CACHE": "false"}
        server = own_server.OwnServer(
            str(options.model), store, dtype=options.dtype, environment=environment
        )
        with server.running(Path(folder) / "server.log") as running:
            return asyncio.run(_measure(running.url, options, progress))


async def _measure(
    url: str, options: StructuredOptions, progress: Callable[[str], None]
) -> StructuredResult:
    async with httpx.AsyncClient(base_url=url, timeout=_SECONDS, trust_env=False) as http:
        await _closed_loop(http, list(islice(_orders(), _WARMUP)), _WARMUP, options)
        last = options.first + options.generations
        orders = list(islice(_orders(), options.first, last))
        off = await _closed_loop(http, orders, _TOGETHER, options)
        drafted = [replace(order, turbo=_turbo(order)) for order in orders]
        on = await _closed_loop(http, drafted, _TOGETHER, options)
        invalid = [
            f"{order.case.name}: {fault}"
            for order, answer in zip(orders, off, strict=True)
            if (fault := _fault(order.case, answer.text))
        ]
        progress(f"{len(orders)} generations, {len(invalid)} invalid")
        speeds = []
        for workers in options.concurrency:
            speeds.append(await _speed(http, workers, options))
            progress(f"{workers} workers: {speeds[-1]}")
    tokens = sum(answer.tokens for answer in on)
    return StructuredResult(
        generations=len(orders),
        invalid=tuple(invalid),
        different=sum(a.text != b.text for a, b in zip(off, on, strict=True)),
        accepted_share=sum(answer.accepted for answer in on) / tokens if tokens else 0.0,
        speeds=tuple(speeds),
    )


async def _speed(
    http: httpx.AsyncClient, workers: int, options: StructuredOptions
) -> StructuredSpeed:
    count = max(workers * options.requests_per_worker, len(CASES))
    orders = [replace(order, temperature=0.0) for order in islice(_orders(), count)]
    seconds, constrained = await _timed(http, orders, workers, options)
    lengths = [answer.tokens for answer in constrained]
    total = sum(lengths)
    free = [replace(o, free_tokens=n) for o, n in zip(orders, lengths, strict=True)]
    free_seconds, _ = await _timed(http, free, workers, options)
    drafted = [replace(order, turbo=_turbo(order)) for order in orders]
    turbo_seconds, _ = await _timed(http, drafted, workers, options)
    return StructuredSpeed(workers, total / free_seconds, total / seconds, total / turbo_seconds)


async def _timed(
    http: httpx.AsyncClient,
    orders: Sequence[StructuredRequest],
    workers: int,
    options: StructuredOptions,
) -> tuple[float, list[StructuredAnswer]]:
    started = time.monotonic()
    answers = await _closed_loop(http, orders, workers, options)
    return time.monotonic() - started, answers


async def _closed_loop(
    http: httpx.AsyncClient,
    orders: Sequence[StructuredRequest],
    workers: int,
    options: StructuredOptions,
) -> list[StructuredAnswer]:
    """All orders, so many at a time; in their order."""
    answers: dict[int, StructuredAnswer] = {}
    waiting = iter(enumerate(orders))

    async def work() -> None:
        for index, order in waiting:
            answers[index] = await _ask(http, order, options.max_tokens)

    await asyncio.gather(*(work() for _ in range(workers)))
    return [answers[index] for index in range(len(orders))]


async def _ask(
    http: httpx.AsyncClient, order: StructuredRequest, max_tokens: int
) -> StructuredAnswer:
    response = await http.post("/v1/chat/completions", json=order.body(max_tokens))
    if response.status_code != 200:
        raise RuntimeError(f"{order.case.name}: {response.status_code}: {response.text[:400]}")
    answer = response.json()
    usage = answer["usage"]
    details = usage.get("completion_tokens_details", {})
    return StructuredAnswer(
        text=answer["choices"][0]["message"]["content"],
        tokens=usage["completion_tokens"],
        accepted=details.get("accepted_prediction_tokens", 0),
    )


def _orders() -> Iterator[StructuredRequest]:
    """The schemas in turn, on the base and on the adapter by turns, each with a seed of its own."""
    for seed, case in enumerate(cycle(CASES)):
        model = (own_server.BASE_NAME, ADAPTER)[(seed + seed // len(CASES)) % 2]
        yield StructuredRequest(case, model, seed)


def _turbo(order: StructuredRequest) -> str:
    """Drafter of a request: the adapter's own heads, or for the base words of the prompt."""
    return "auto" if order.model == ADAPTER else "lookup"


def _fault(case: SchemaCase, text: str) -> str | None:
    """Fault of an answer; None: it is valid."""
    try:
        jsonschema.Draft202012Validator(case.schema).validate(json.loads(text))
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        return f"{str(error).splitlines()[0]} in {text[-80:]!r}"
    return None


def _demo_store(folder: Path, model: Path) -> Path:
    from quickchange_store.base_model.base_spec import base_spec
    from quickchange_store.store import Store
    from quickchange_training.demo import publish_demo_adapters

    publish_demo_adapters(Store(folder), base_spec(str(model)))
    return folder


def structured_table(result: StructuredResult) -> str:
    """Markdown table of the result."""
    head = ("workers", "free, tokens/s", "constrained", "of free", "constrained, Turbo", "of free")
    rows = [
        (
            str(speed.workers),
            number(speed.free),
            number(speed.constrained),
            number(speed.constrained / speed.free, 2),
            number(speed.constrained_turbo),
            number(speed.constrained_turbo / speed.free, 2),
        )
        for speed in result.speeds
    ]
    lines = [
        f"{result.generations} generations: {len(result.invalid)} invalid, "
        f"{result.different} differ with Turbo, {result.accepted_share:.0%} of tokens from drafts",
        *result.invalid,
    ]
    return "\n".join([*lines, table(head, rows)])
