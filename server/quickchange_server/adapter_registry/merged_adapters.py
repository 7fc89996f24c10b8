"""Adapters merged from others on a client's request: made once, while requests run, and kept.

A merged adapter is a store version without a name. A separate process (one thread, low priority)
makes it, one at a time. Notes in the store map each recipe to its digest, so that the mapping
outlives a restart and serves every replica on that store. At most `limit` are kept: the
least recently used goes first, and one whose components have lost their names goes when the next
one is made.

HTTP and the merging methods are not known here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from dataclasses import dataclass

from quickchange_server.errors import (
    EngineFailedError,
    QueueFullError,
    RequestFailedError,
    UnavailableError,
)
from quickchange_store.combining.merging import Recipe, job, result
from quickchange_store.store import Store

FOLDER = "derived"  # of the store's notes; one per recipe, KEY.digests
_SUFFIX = ".digests"
MAX_WAITING = 16  # recipes being merged or waiting
MAKING_SECONDS = 600.0  # for one merge; others wait meanwhile
KEPT_ANEW_SECONDS = 60.0  # a version's use is noted in the store at most so often
IN_USE_SECONDS = 600.0  # a version used this recently may still be needed by a request

logger = logging.getLogger(__name__)


@dataclass
class _Making:
    """A merge that waits or runs."""

    task: asyncio.Task[str]
    waiting: int = 0  # requests that wait for it


class Derived:
    """The merged adapters of one store. Used on one event loop."""

    def __init__(self, store: Store, limit: int, *, making_seconds: float = MAKING_SECONDS) -> None:
        self._store = store
        self._limit = limit
        self._notes = store.notes(FOLDER)
        self._turn = asyncio.Semaphore(1)
        self._making_seconds = making_seconds
        self._making: dict[str, _Making] = {}
        self._under_way: str | None = None  # key of the recipe being merged
        self._kept: dict[str, tuple[str, float]] = {}  # recipe's key: digest, time of last note

    async def digest(self, recipe: Recipe) -> str:
        """The digest of the merged adapter, made first if the store lacks it.

        Requests for one recipe share one merge. Raises QueueFullError, EngineFailedError,
        RequestFailedError if the merge takes too long, UnavailableError if the server shuts down,
        and StoreError if these adapters can't be merged in this way.
        """
        key = recipe.key
        digest, kept = self._kept.get(key, ("", 0.0))
        if digest and time.monotonic() - kept < KEPT_ANEW_SECONDS:
            return digest
        making = self._making.get(key) or self._begin(recipe)
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)  # others may wait for it too
        except asyncio.CancelledError:
            if making.task.cancelled():
                raise UnavailableError(
                    "the server is shutting down; send the request again"
                ) from None
            raise
        finally:
            making.waiting -= 1
            if not making.waiting and self._under_way != key:
                making.task.cancel()
                self._made(key, making)

    def _begin(self, recipe: Recipe) -> _Making:
        if len(self._making) >= MAX_WAITING:
            raise QueueFullError(
                f"merged_adapters: {MAX_WAITING} merges are under way or waiting; "
                "send the request again later, or merge with linear, which needs no making",
                retry_after=10.0,
            )
        key = recipe.key
        task = asyncio.create_task(self._find_or_make(recipe), name="derive")
        making = self._making[key] = _Making(task)
        task.add_done_callback(lambda _: self._made(key, making))
        return making

    async def close(self) -> None:
        """Cancel all merges."""
        tasks = [making.task for making in self._making.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _made(self, key: str, making: _Making) -> None:
        if self._making.get(key) is making:
            del self._making[key]
        if making.task.done() and not making.task.cancelled():
            making.task.exception()  # retrieved, even if every waiting request has gone

    async def _find_or_make(self, recipe: Recipe) -> str:
        digest = await asyncio.to_thread(self._find, recipe)
        if digest is None:
            async with self._turn:
                self._under_way = recipe.key
                try:
                    digest = await self._make(recipe)
                finally:
                    self._under_way = None
            await asyncio.to_thread(self._remember, recipe, digest)
        self._kept[recipe.key] = digest, time.monotonic()
        return digest

    async def _make(self, recipe: Recipe) -> str:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "quickchange_store.combining.merging",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            async with asyncio.timeout(self._making_seconds):
                output, said = await process.communicate(job(self._store, recipe))
        except TimeoutError as error:
            logger.error("merging %s took over %.0f s: ended", recipe, self._making_seconds)
            raise RequestFailedError(
                f"merged_adapters: merging took more than {self._making_seconds:.0f} s; merge "
                "fewer adapters, adapters of one rank, or with linear, which needs no making",
                param="merged_adapters",
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            logger.error("merging %s failed: %s", recipe, said.decode(errors="replace"))
            raise EngineFailedError(
                "merged_adapters: merging failed; the server's log has the reason",
                param="merged_adapters",
            )
        digest = result(output)
        logger.info("derived %s in %.1f s: %s", digest[:12], time.monotonic() - began, recipe)
        return digest

    # --- the store's notes; called on threads ---------------------------------------------------

    def _find(self, recipe: Recipe) -> str | None:
        """The recipe's digest, if it was merged before and the store still has it."""
        name = recipe.key + _SUFFIX
        note = self._notes.read(name)
        if note is None:
            return None
        digest = note.split()[0]
        if not self._store.keep(digest):
            return None
        self._notes.write(name, note)  # its time is that of the last use
        return digest

    def _remember(self, recipe: Recipe, digest: str) -> None:
        words = [digest, *(component for component, _ in recipe.components)]
        self._notes.write(recipe.key + _SUFFIX, "\n".join(words))
        self._trim()

    def _trim(self) -> None:
        """Drop merged adapters over the limit, and those whose components are gone.

        Other replicas may do so too: what one has removed is gone for all.
        """
        named = self._store.snapshot().digests()
        used = {n: at for n, at in self._notes.times().items() if n.endswith(_SUFFIX)}
        for place, name in enumerate(sorted(used, key=used.__getitem__, reverse=True)):
            if time.time() - used[name] <= IN_USE_SECONDS:
                continue
            digest, *components = (self._notes.read(name) or "").split() or [""]
            if digest and (place >= self._limit or not named.issuperset(components)):
                self._notes.remove(name)
                self._store.discard(digest, IN_USE_SECONDS)  # unless another has taken it up
                self._kept.pop(name.removesuffix(_SUFFIX), None)
