"""A folder whose folders are adapters: what is put there, or changes, is published under its name.

For those who sync files (rsync, git-sync, a mounted volume). A folder is read once its files have
stayed the same for a look, so that a copy under way is not. One that is removed changes nothing:
the store keeps what it has, and a version that was rolled back stays so.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.errors import QuickchangeError
from quickchange_store.errors import StoreError

SECONDS = 2.0  # between two looks

logger = logging.getLogger(__name__)

_Files = tuple[tuple[str, int, int], ...]  # name, bytes, time of the last change


class WatchedFolder:
    """Looks at a folder until it is closed."""

    def __init__(self, folder: Path, imports: Imports) -> None:
        self._folder = folder
        self._imports = imports
        self._seen: dict[str, _Files] = {}  # as of the last look
        self._read: dict[str, _Files] = {}  # as they were read
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="watched-folder")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(SECONDS)

    async def look(self) -> None:
        """Publish what has changed since it was last read and not since the last look."""
        try:
            now = await asyncio.to_thread(_listed, self._folder)
        except OSError as error:
            logger.warning("adapter_watch can't be read: %s", error)
            return
        for name, files in now.items():
            if self._seen.get(name) == files != self._read.get(name):
                await self._publish(name)
                self._read[name] = files
        self._seen = now

    async def _publish(self, name: str) -> None:
        try:
            added = await self._imports.add_unless_known(name, self._folder / name)
        except (StoreError, QuickchangeError, OSError) as error:
            logger.warning("adapter_watch: %r is not published: %s", name, error)
            return
        except Exception:  # a reader's own defect; the other folders are still to be read
            logger.exception("adapter_watch: %r is not published", name)
            return
        if added is not None:
            logger.info("adapter_watch: %s is published", added.version)


def _listed(folder: Path) -> dict[str, _Files]:
    """The files of each folder in it that has any. Raises OSError."""
    found = {}
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.name.startswith("."):
            files = [(path.name, path.stat()) for path in sorted(each.iterdir()) if path.is_file()]
            if files:
                found[each.name] = tuple((n, s.st_size, s.st_mtime_ns) for n, s in files)
    return found
