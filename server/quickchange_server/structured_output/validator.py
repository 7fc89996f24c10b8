"""Constraints judged for the event loop, before admission: each content once, in bounded time.

What clients send is compiled in a process of its own (`validator_process.py`), which is ended where
it takes too long: patterns that intersect can keep a compiler busy for hours. Verdicts are kept by
content.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import LRUCache

from quickchange_server.errors import InvalidRequestError, QueueFullError
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.errors import NO_TOKENIZER
from quickchange_server.structured_output.schema_keywords import place_of

_KEPT = 256  # verdicts
_MOST_WAITING = 32  # distinct contents
_SECONDS = 5.0  # to compile one
_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A constraint, and the field that asks for it."""

    constraint: Constraint
    place: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: str | None = None  # None: it compiles
    path: tuple[str | int, ...] = ()  # in a schema


class Vocabulary(Protocol):
    """The tokenizer that constraints are compiled for."""

    vocab_size: int
    eos_ids: frozenset[int]

    def tokenizer_json(self) -> str | None:
        """As the `tokenizers` library writes it; None where it is none of that."""


class CheckObserver(Protocol):
    """Counts what is checked."""

    def request(self, kind: str) -> None:
        """A request has a constraint of this kind."""

    def compiled(self, seconds: float) -> None:
        """One has been compiled in so many seconds."""


class _CheckerGoneError(Exception):
    """The process ended, or had to be ended."""


class ConstraintChecks:
    """Owner of the checking process, which starts with the first constraint. On one event loop."""

    def __init__(
        self, text: Vocabulary, metrics: CheckObserver, *, seconds: float = _SECONDS
    ) -> None:
        """seconds: that one constraint may take to compile."""
        self._text = text
        self._metrics = metrics
        self._seconds = seconds
        self._kept: LRUCache[Constraint, _Verdict] = LRUCache(_KEPT)
        self._running: dict[Constraint, asyncio.Task[_Verdict]] = {}
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def accept(self, asked: Asked) -> Constraint:
        """The constraint, if it compiles. Raises InvalidRequestError, which names the place, and
        QueueFullError where many others are waiting to be compiled."""
        verdict = await self._verdict(asked.constraint)
        if verdict.error is not None:
            place = place_of(asked.place, list(verdict.path))
            raise InvalidRequestError(f"{place}: {verdict.error}", param=place)
        self._metrics.request(asked.constraint.kind)
        return asked.constraint

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._end()

    async def _verdict(self, constraint: Constraint) -> _Verdict:
        known = self._kept.get(constraint)
        if known is not None:
            return known
        task = self._running.get(constraint)
        if task is None:
            if len(self._running) >= _MOST_WAITING:
                raise QueueFullError(
                    f"{_MOST_WAITING} schemas are waiting to be compiled; try again shortly",
                    retry_after=self._seconds,
                )
            task = self._running[constraint] = asyncio.create_task(self._judge(constraint))
            task.add_done_callback(lambda _: self._running.pop(constraint))
        return await asyncio.shield(task)  # others may wait for it too

    async def _judge(self, constraint: Constraint) -> _Verdict:
        async with self._turn:
            started = time.monotonic()
            try:
                verdict = await self._compile(constraint)
            except _CheckerGoneError:
                await self._end()
                verdict = _Verdict(
                    f"takes longer than {self._seconds:g} s or too much memory to compile; simplify"
                    " it: patterns that must hold together, and long repetitions, cost most"
                )
            self._metrics.compiled(time.monotonic() - started)
        self._kept[constraint] = verdict
        return verdict

    async def _compile(self, constraint: Constraint) -> _Verdict:
        if self._process is None:
            unreadable = await self._start()
            if unreadable is not None:
                await self._end()
                return _Verdict(f"can't be served: {unreadable}")
        line = {"kind": constraint.kind, "source": constraint.source}
        answer = await self._ask(line, self._seconds)
        return _Verdict(answer["error"], tuple(answer.get("path", ())))

    async def _start(self) -> str | None:
        """Why the tokenizer can't be read; None: the process is ready."""
        tokenizer = self._text.tokenizer_json()
        if tokenizer is None:
            return NO_TOKENIZER
        module = f"{__package__}.validator_process"
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
        )
        begin = {
            "tokenizer": tokenizer,
            "vocabulary": self._text.vocab_size,
            "ends": sorted(self._text.eos_ids),
        }
        answer = await self._ask(begin, _START_SECONDS)
        error: str | None = answer["error"]
        return error

    async def _ask(self, line: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise _CheckerGoneError
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(json.dumps(line).encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            raise _CheckerGoneError from error
        if not answer:
            raise _CheckerGoneError
        told: dict[str, Any] = json.loads(answer)
        return told

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()
