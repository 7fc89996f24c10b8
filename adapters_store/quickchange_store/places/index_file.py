"""The index as one file, which is replaced whole."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from quickchange_store.errors import CorruptStoreError
from quickchange_store.index import MAX_INDEX_BYTES, Index, damaged, decode
from quickchange_store.json_files import UnreadableFileError, open_to_read, read_opened


class IndexFile:
    """The index on disk, read again only when it has been replaced.

    Keeps the file that it last read open: the system can't give that file's inode to a newer file
    in the meantime, so comparing inodes never takes a new index for the old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        self._seen: tuple[int, int, int, int] | None = None
        self._index = Index()
        self._descriptors: list[int] = []  # the file last read, or none
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self) -> Index:
        """The index as it is now; empty where there is none yet. Raises CorruptStoreError."""
        with self._mutex:
            try:
                if _identity(self.path.stat()) != self._seen:
                    self._reload()
            except FileNotFoundError:
                self._forget()
            except OSError as error:
                raise CorruptStoreError(
                    f"the index can't be read: {error.strerror}",
                    file=str(self.path),
                    remedy="see that it may be read, and that its folder is a store's",
                ) from error
            return self._index

    def _reload(self) -> None:
        descriptor = open_to_read(self.path)
        try:
            status = os.fstat(descriptor)
            index = decode(read_opened(descriptor, MAX_INDEX_BYTES), self.path)
        except UnreadableFileError as error:
            os.close(descriptor)
            raise damaged(self.path, error.problem) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._forget()
        self._descriptors.append(descriptor)
        self._seen = _identity(status)
        self._index = index

    def _forget(self) -> None:
        _close_all(self._descriptors)
        self._seen = None
        self._index = Index()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
