"""Errors of the store and of the format readers.

    StoreError
    ├── InvalidAdapterError       the directory's content is wrong: missing, extra, damaged, NaN
    ├── UnsupportedFeatureError   valid, but not served by this version
    ├── BaseMismatchError         made for another base model: architecture or shapes
    ├── BaseModelError            the base model itself can't be read
    ├── InvalidNameError          a name, alias or reference is malformed or reserved
    ├── AdapterNotFoundError      no such name, version or alias
    │   └── AmbiguousVersionError a digest prefix fits several versions
    ├── NameConflictError         the name is taken by the other kind (name, alias)
    │   └── InUseError            an alias or the current pointer holds what is to be removed
    ├── AdapterSourceError        an adapter can't be fetched from its URL, now or later
    │   └── NoAdapterThereError   there is nothing at the URL
    ├── SourceUnavailableError    the place of an adapter's URL can't be reached now
    ├── NoStoreError              there is no store at this path
    ├── StoreLocationError        a store's path or URL can't be used
    ├── StoreUnavailableError     the store can't be reached now
    └── CorruptStoreError         the store's own files are damaged
        └── CorruptVersionError   one stored version is damaged

Each message names the file, the key inside it and the remedy, which are attributes as well.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

MAX_PROBLEM, MAX_KEY = 2000, 300  # characters: what a folder holds may be of any length


class StoreError(Exception):
    """Base class. The message reads "FILE: KEY: PROBLEM; REMEDY"."""

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        key: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem = _one_line(problem, MAX_PROBLEM)
        self.file = file  # a file's name inside the adapter's directory, or a path in the store
        # a field, a tensor, a module, a name or a digest
        self.key = key = None if key is None else _one_line(key, MAX_KEY)
        self.remedy = remedy
        where = "".join(f"{part}: " for part in (file, key) if part is not None)
        super().__init__(where + problem + ("" if remedy is None else f"; {remedy}"))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the message alone when an error crosses processes.
        return (_rebuild, (type(self), self.problem, self.file, self.key, self.remedy))


def _one_line(text: str, limit: int) -> str:
    """The text as one printable line of at most `limit` characters."""
    shown = " ".join(text[: 4 * limit].split())[: limit + 1]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _rebuild(
    kind: type[StoreError], problem: str, file: str | None, key: str | None, remedy: str | None
) -> StoreError:
    return kind(problem, file=file, key=key, remedy=remedy)


class InvalidAdapterError(StoreError):
    """The adapter's files are incomplete, inconsistent or damaged."""


class UnsupportedFeatureError(StoreError):
    """The adapter uses something that this version does not serve; the message names it."""


class BaseMismatchError(StoreError):
    """The adapter was made for a base model of another architecture or other shapes."""


class BaseModelError(StoreError):
    """The base model's configuration or weights can't be read."""


class InvalidNameError(StoreError):
    """A name, an alias or a reference does not follow the rules, or is reserved."""


class AdapterNotFoundError(StoreError):
    """No such name, version or alias."""


class AmbiguousVersionError(AdapterNotFoundError):
    """A digest prefix fits several versions of the name."""


class NameConflictError(StoreError):
    """The name is already an alias, or the alias already a name."""


class InUseError(NameConflictError):
    """An alias or a current pointer still needs the version; the message names it."""


class AdapterSourceError(StoreError):
    """A URL of an adapter can't be read, is not allowed, or has no adapter."""


class NoAdapterThereError(AdapterSourceError):
    """There is nothing at a URL, or nothing that this server's credentials may read."""


class SourceUnavailableError(StoreError):
    """The place that a URL of an adapter names does not answer, or not as it should."""


class NoStoreError(StoreError):
    """A command that reads or changes a store found none at its path."""


class StoreLocationError(StoreError):
    """A store's path or URL can't be used; the message says what would do."""


class StoreUnavailableError(StoreError):
    """The store can't be reached, or does not answer; nothing is known to have changed."""


class CorruptStoreError(StoreError):
    """The store's own files are damaged or of an unknown format."""


class CorruptVersionError(CorruptStoreError):
    """A stored version is missing or damaged."""


def os_error_line(error: OSError) -> str:
    """What failed, on one line, with the remedy where it is known."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    problem = error.strerror or str(error) or type(error).__name__
    return _one_line(where + problem + _os_remedy(error), MAX_PROBLEM)


def _os_remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f" ({_space(error.filename)}); free some there, or choose another place"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "; see that this user may write there, or choose another place"
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return "; see the path"
    return ""


def _space(path: str | bytes | int | None) -> str:
    """Free space where a write failed, by the nearest folder that there is."""
    place = Path.cwd() if path is None or isinstance(path, int) else Path(os.fsdecode(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    return f"{free / 2**20:,.1f} MiB are free in {place}"
