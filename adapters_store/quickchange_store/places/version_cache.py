"""Files that were fetched, in a folder that this machine's processes share.

A file is fetched once, however many wait for it, and is seen once it is whole. The folder stays
within a size: what was used least recently goes first, and what was used in these seconds stays.
Any process may remove a file at any time; one that is mapped into memory is not hurt by it.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from quickchange_store.files import abandoned, delete, exclusive_lock, placed

IN_USE_SECONDS = 10.0  # between finding a file and having it open
ABANDONED_SECONDS = 3600.0  # an unfinished file that nobody has written to for so long


class VersionCache:
    """Files by name under `folder`, `limit` bytes at most."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self._limit = limit

    def find(self, name: str) -> Path | None:
        """The file, which counts as used now; None where it is not here."""
        path = self._path(name)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetched(self, name: str, fetch: Callable[[Path], None]) -> Path:
        """The file, made by `fetch` at the path that it is given where it is not here.

        Others that ask for it meanwhile wait, in other processes too. Raises what `fetch` does.
        """
        with placed(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            locks = self.folder / "locks"
            locks.mkdir(exist_ok=True)
            with exclusive_lock(locks / f"{name[:2]}.lock"):
                found = self.find(name)
                if found is not None:
                    return found
                return self._fetched(name, fetch)

    def _fetched(self, name: str, fetch: Callable[[Path], None]) -> Path:
        unfinished = self.scratch()
        try:
            try:
                fetch(unfinished)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                unfinished.unlink(missing_ok=True)
                self._trim(0)  # the disk is smaller than the limit
                fetch(unfinished)
            path = self._path(name)
            path.parent.mkdir(exist_ok=True)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._trim(self._limit)
        return path

    def drop(self, name: str) -> None:
        """Remove a file that is of no use."""
        self._path(name).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A path of no file yet, on the same disk."""
        folder = self.folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / secrets.token_hex(16)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _trim(self, limit: int) -> None:
        """Remove what was used least recently, down to `limit`, and what died unfinished."""
        now = time.time()
        for path in (self.folder / "tmp").iterdir():
            if abandoned(path, now - ABANDONED_SECONDS):
                delete(path)
        files = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - limit
        for used, size, path in sorted(files):
            if excess <= 0 or used > now - IN_USE_SECONDS:
                return
            path.unlink(missing_ok=True)
            excess -= size
