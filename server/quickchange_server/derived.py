"""Adapters that requests bring about by merging others: made once beside decoding, and kept.

A derived adapter is a version of the store that no name refers to, made by a process of its own
(one thread, low priority) that takes turns with others like it. Which recipe came to which digest
is kept in files of the store's folder, so that it outlives a restart and serves every replica on
that folder. At most `limit` are kept: the one that was used least recently goes first, and one
whose components no name refers to any more goes with the next that is made.

Knows nothing of HTTP or of how adapters are merged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from quickchange_server.errors import EngineFailedError, QueueFullError
from quickchange_store.files import exclusive_lock, replace_atomically
from quickchange_store.merging import Recipe, job, result
from quickchange_store.store import Store

FOLDER = "derived"  # of the store: a file RECIPE'S KEY.digests for each
MAX_WAITING = 16  # recipes that are being made or wait for it
KEPT_ANEW_SECONDS = 60.0  # a version's time in the store is started anew at most so often
IN_USE_SECONDS = 600.0  # a version used within it may still have to be loaded for some request

logger = logging.getLogger(__name__)


class Derived:
    """The derived adapters of one store. Used on one event loop."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._folder = store.root / FOLDER
        self._turn = asyncio.Semaphore(1)
        self._making: dict[str, asyncio.Task[str]] = {}
        self._kept: dict[str, tuple[str, float]] = {}  # recipe's key: digest, when it was kept

    async def digest(self, recipe: Recipe) -> str:
        """The digest of what the recipe comes to, made where the store lacks it.

        Requests for one recipe share one making. Raises QueueFullError, EngineFailedError, and
        StoreError where these adapters can't be merged so.
        """
        key = recipe.key
        digest, kept = self._kept.get(key, ("", 0.0))
        if digest and time.monotonic() - kept < KEPT_ANEW_SECONDS:
            return digest
        task = self._making.get(key)
        if task is None:
            if len(self._making) >= MAX_WAITING:
                raise QueueFullError(
                    f"merged_adapters: {MAX_WAITING} merges are under way or waiting; "
                    "send the request again later, or merge with linear, which needs no making",
                    retry_after=10.0,
                )
            task = asyncio.create_task(self._find_or_make(recipe), name="derive")
            self._making[key] = task
            task.add_done_callback(partial(self._made, key))
        return await asyncio.shield(task)  # others may wait for it too

    async def close(self) -> None:
        """End what is being made."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _made(self, key: str, task: asyncio.Task[str]) -> None:
        del self._making[key]
        if not task.cancelled():
            task.exception()  # seen, even where everyone who waited has gone

    async def _find_or_make(self, recipe: Recipe) -> str:
        digest = await asyncio.to_thread(self._find, recipe)
        if digest is None:
            async with self._turn:
                digest = await self._make(recipe)
            await asyncio.to_thread(self._remember, recipe, digest)
        self._kept[recipe.key] = digest, time.monotonic()
        return digest

    async def _make(self, recipe: Recipe) -> str:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "quickchange_store.merging",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            output, said = await process.communicate(job(self._store.root, recipe))
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            logger.error("merging %s failed: %s", recipe, said.decode(errors="replace"))
            raise EngineFailedError(
                "merged_adapters: merging failed; the server's log has the reason",
                param="merged_adapters",
            )
        digest = result(output)
        logger.info("derived %s in %.1f s: %s", digest[:12], time.monotonic() - began, recipe)
        return digest

    # --- what is known, on disk; on threads -----------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.digests"

    def _find(self, recipe: Recipe) -> str | None:
        """The digest that the recipe came to before, where the store still has it."""
        path = self._path(recipe.key)
        try:
            digest = path.read_text().split()[0]
        except FileNotFoundError:
            return None
        if not self._store.keep(digest):
            return None
        path.touch()
        return digest

    def _remember(self, recipe: Recipe, digest: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        words = [digest, *(component for component, _ in recipe.components)]
        scratch = self._store.root / "tmp"
        replace_atomically(self._path(recipe.key), "\n".join(words).encode(), scratch)
        self._trim()

    def _trim(self) -> None:
        """Drop what is over the limit, and what was merged of adapters that are gone."""
        named = self._store.snapshot().digests()
        with exclusive_lock(self._folder / "lock"):  # other replicas trim as well
            used = {path: path.stat().st_mtime for path in self._folder.glob("*.digests")}
            for place, path in enumerate(sorted(used, key=used.__getitem__, reverse=True)):
                digest, *components = path.read_text().split()
                idle = time.time() - used[path] > IN_USE_SECONDS
                if idle and (place >= self._limit or not named.issuperset(components)):
                    path.unlink()
                    self._store.discard(digest)
                    self._kept.pop(path.stem, None)
