"""Where adapters are imported: in a worker, so that the API process has no torch, or on a thread.

A worker stays while there is work, and ends when it is idle: until the next import it takes no
memory. Knows nothing of what it runs, or of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Protocol, TypeVar

from quickchange_server.workers.torch_worker import TorchWorker, torch_is_loaded
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.store import Store

IDLE_SECONDS = 30.0  # until a worker ends; making it again takes a few seconds at most

T = TypeVar("T")
BaseMaker = Callable[[], BaseSpec]
Opening = tuple[str, str | None, int | None]


class ImportRunner(Protocol):
    """Runs functions of a store, of what makes the base's spec once, and of further arguments."""

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What the function returns or raises. It can be pickled, as its arguments can."""

    async def close(self) -> None:
        """Wait for what runs, and end."""


class ThreadRunner:
    """`ImportRunner` on a thread of this process, which has torch anyway."""

    def __init__(self, store: Store, base: BaseMaker, spare_tokens: int | None = None) -> None:
        """spare_tokens: that the served model has rows for; None: any number."""
        self._store = store
        self._base = cache(lambda: replace(base(), spare_tokens=spare_tokens))

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        asked = partial(work, self._store, self._base, *arguments)
        return await asyncio.to_thread(asked)

    async def close(self) -> None:
        pass


class WorkerRunner:
    """`ImportRunner` in a worker. Raises WorkerFailedError where that one ends."""

    def __init__(self, store: Store, model: str, spare_tokens: int | None) -> None:
        self._store = store
        self._base = model, spare_tokens
        self._worker = TorchWorker()
        self._end: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        if self._end is not None:
            self._end.cancel()
        try:
            return await asyncio.to_thread(self._run, work, arguments)
        finally:
            self._end = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._rest)

    def _run(self, work: Callable[..., T], arguments: tuple[object, ...]) -> T:
        try:
            done: T = self._worker.run(
                _run_here, self._store.opening, *self._base, work, *arguments
            )
            return done
        finally:
            self._store.look()  # what the worker published is there for the next request

    def _rest(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._worker.end_unless_busy)

    async def close(self) -> None:
        if self._end is not None:
            self._end.cancel()
        await asyncio.to_thread(self._worker.end)


def import_runner(
    store: Store, model: str, spare_tokens: int | None, base: BaseMaker | None = None
) -> ImportRunner:
    """The runner for this process. `base` makes the base's spec in place of the model's own."""
    if base is None and not torch_is_loaded():
        return WorkerRunner(store, model, spare_tokens)
    return ThreadRunner(store, base or partial(base_spec, model), spare_tokens)


# --- in the worker ------------------------------------------------------------------------------


def _run_here(
    opening: Opening,
    model: str,
    spare_tokens: int | None,
    work: Callable[..., T],
    *arguments: object,
) -> T:
    return work(_opened(opening), lambda: _spec(model, spare_tokens), *arguments)


@cache
def _opened(opening: Opening) -> Store:
    return Store(*opening)


@cache
def _spec(model: str, spare_tokens: int | None) -> BaseSpec:
    return replace(base_spec(model), spare_tokens=spare_tokens)
