"""Validation of constraints before admission: each content is compiled once, in bounded time.

Constraints are compiled in a separate process (`validator_process.py`), which is killed if it
takes too long: intersecting patterns can keep the compiler busy for hours. Verdicts are cached by
content.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cachetools import LRUCache

from quickchange_server.errors import InvalidRequestError, QueueFullError
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.errors import NO_TOKENIZER
from quickchange_server.structured_output.subschemas import place_of

_KEPT = 256  # verdicts in the cache
_MOST_WAITING = 32  # distinct constraints
_SECONDS = 5.0  # to compile one constraint
_START_SECONDS = 30.0
_LONGEST_ANSWER = 4 << 20  # bytes: a path may hold a name as long as the schema, all escapes


@dataclass(frozen=True, slots=True)
class Asked:
    """A constraint and the request's field that holds it."""

    constraint: Constraint
    place: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: str | None = None  # None: it compiles
    path: tuple[str | int, ...] = ()  # of the fault in a schema


class Vocabulary(Protocol):
    """The tokenizer that constraints are compiled for."""

    vocab_size: int
    eos_ids: frozenset[int]

    def tokenizer_json(self) -> str | None:
        """JSON of the `tokenizers` library; None for a tokenizer of another kind."""


class CheckObserver(Protocol):
    """Receiver of events for metrics."""

    def request(self, kind: str) -> None:
        """A request with a constraint of this kind was accepted."""

    def compiled(self, seconds: float) -> None:
        """A constraint was compiled in `seconds`."""


class _CheckerGoneError(Exception):
    """The process ended or did not answer in time."""


class ConstraintChecks:
    """Validates constraints in a process started with the first one. Used on one event loop."""

    def __init__(
        self, text: Vocabulary, metrics: CheckObserver, *, seconds: float = _SECONDS
    ) -> None:
        """`seconds`: time limit for compiling one constraint."""
        self._text = text
        self._metrics = metrics
        self._seconds = seconds
        self._kept: LRUCache[Constraint, _Verdict] = LRUCache(_KEPT)
        self._running: dict[Constraint, asyncio.Task[_Verdict]] = {}
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def accept(self, asked: Asked) -> Constraint:
        """Return the constraint if it compiles. Raises InvalidRequestError, which names the place,
        and QueueFullError if too many others wait to be compiled."""
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
        return await asyncio.shield(task)  # other requests may wait for it too

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
        line = asdict(constraint)
        answer = await self._ask(line, self._seconds)
        return _Verdict(answer["error"], tuple(answer.get("path", ())))

    async def _start(self) -> str | None:
        """Start the process. Returns the error if it can't read the tokenizer, else None."""
        tokenizer = self._text.tokenizer_json()
        if tokenizer is None:
            return NO_TOKENIZER
        module = f"{__package__}.validator_process"
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            limit=_LONGEST_ANSWER,
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
        decoded: dict[str, Any] = json.loads(answer)
        return decoded

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()
