"""Objects under a URL, through fsspec: whole ones, by keys; nothing is known of what they hold.

Every call ends within a time of its own, and every failure of a library is StoreUnavailableError.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quickchange_store.errors import StoreLocationError, StoreUnavailableError

SLOWEST = 1 << 20  # bytes a second: a transfer may take its size by this, besides

# Filesystems that create an object only where there is none, of several writers for one, and the
# extra that installs the library of each.
EXCLUSIVE = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "memory": None}

_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
_IN_MEMORY = threading.RLock()  # its files have one position for all who read them


@dataclass(frozen=True, slots=True)
class Stored:
    """An object, as a listing tells of it."""

    size: int
    modified: float  # seconds since 1970, by the service's clock


class Objects:
    """The objects whose keys begin with `root`, on an fsspec file system. `shown` is their URL."""

    call_seconds = 10.0  # for one small object, or a page of a listing

    def __init__(self, filesystem: Any, root: str, shown: str) -> None:
        self._files = filesystem
        self._root = root.rstrip("/")
        self.shown = shown
        self._waits = bool(filesystem.async_impl)

    @classmethod
    def at(cls, url: str) -> Objects:
        """Those under a URL whose scheme is in EXCLUSIVE. Raises StoreLocationError."""
        import fsspec

        scheme = url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(scheme)
            # Listings are read anew: other machines write here.
            files = kind(use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise StoreLocationError(
                f"{scheme}:// needs a library that is not installed ({error})",
                file=url,
                remedy=f"pip install 'quickchange[{EXCLUSIVE[scheme]}]'",
            ) from error
        except Exception as error:
            raise _unavailable(url, error) from error
        return cls(files, kind._strip_protocol(url), url)

    def address(self, key: str) -> str:
        """The URL of an object."""
        return f"{self.shown}/{key}"

    # --- reading --------------------------------------------------------------------------------

    def read(self, key: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        try:
            # With a start, s3fs asks for no size before: one call, whatever there is.
            return bytes(self._call(key, self._files.cat_file, self._path(key), start=0))
        except FileNotFoundError:
            return None

    def stat(self, key: str) -> Stored | None:
        """An object's size and time; None where there is none."""
        try:
            return _stored(self._call(key, self._files.info, self._path(key)))
        except FileNotFoundError:
            return None

    def under(self, folder: str, seconds: float | None = None) -> dict[str, Stored]:
        """All objects below a folder, by their keys. Raises StoreLocationError: no such bucket."""
        try:
            found = self._call(
                folder, self._files.find, self._path(folder), seconds=seconds, detail=True
            )
        except FileNotFoundError as error:
            raise StoreLocationError(
                f"there is no such bucket ({_said(error)})",
                file=self.shown,
                remedy="make the bucket, or see the URL",
            ) from error
        start = len(self._root) + 1
        return {path[start:]: _stored(entry) for path, entry in found.items()}

    def download(self, key: str, path: Path, size: int) -> None:
        """Write an object's bytes to a local file."""
        seconds = self.call_seconds + size / SLOWEST
        try:
            self._call(key, self._files.get_file, self._path(key), str(path), seconds=seconds)
        except FileNotFoundError as error:
            raise _unavailable(self.address(key), error) from error

    # --- writing --------------------------------------------------------------------------------

    def create(self, key: str, content: bytes) -> None:
        """Write an object only where there is none.

        Any failure may mean that there is one, or that this call has made it: read it to know.
        """
        self._write(key, content, "create")

    def write(self, key: str, content: bytes) -> None:
        """Write an object, in place of one that is there."""
        self._write(key, content, "overwrite")

    def _write(self, key: str, content: bytes, mode: str) -> None:
        try:
            self._call(key, self._files.pipe_file, self._path(key), content, mode=mode)
        except FileNotFoundError as error:
            raise _unavailable(self.address(key), error) from error

    def upload(self, path: Path, key: str) -> None:
        """Write a local file's bytes as an object, in parts where they are many."""
        seconds = self.call_seconds + path.stat().st_size / SLOWEST
        try:
            self._call(key, self._files.put_file, str(path), self._path(key), seconds=seconds)
        except FileNotFoundError as error:
            raise _unavailable(self.address(key), error) from error

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        for key in keys:
            try:
                self._call(key, self._files.rm_file, self._path(key))
            except FileNotFoundError:
                continue

    def abort_uploads(self, before: float) -> int:
        """End uploads in parts that began by then and came to no end; how many there were.

        Where a service has no such list, it forgets them by itself.
        """
        listing = getattr(self._files, "list_multipart_uploads", None)
        if listing is None:
            return 0
        bucket, _, prefix = self._root.partition("/")
        begun = [
            upload
            for upload in self._call("", listing, bucket)
            if upload["Key"].startswith(f"{prefix}/" if prefix else "")
            and upload["Initiated"].timestamp() <= before
        ]
        for upload in begun:
            named = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._call(upload["Key"], self._files.call_s3, "abort_multipart_upload", **named)
        return len(begun)

    # --- internal -------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _call(
        self,
        key: str,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float | None = None,
        **options: Any,
    ) -> Any:
        """Raises FileNotFoundError, OSError of this machine's disk and StoreUnavailableError."""
        turn: AbstractContextManager[Any] = nullcontext() if self._waits else _IN_MEMORY
        if self._waits:
            options["timeout"] = self.call_seconds if seconds is None else seconds
        try:
            with turn:
                return function(*arguments, **options)
        except FileNotFoundError:
            raise
        except Exception as error:  # each library has its own
            if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
                raise
            raise _unavailable(self.address(key), error) from error


def _unavailable(url: str, error: Exception) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"the store can't be used: {_said(error)}",
        file=url,
        remedy="see the service, the URL and the credentials",
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _stored(entry: dict[str, Any]) -> Stored:
    times = (entry.get(name) for name in ("LastModified", "mtime", "updated", "created"))
    return Stored(int(entry["size"]), _seconds(next(at for at in times if at is not None)))


def _seconds(at: datetime | float | str) -> float:
    if isinstance(at, str):
        at = datetime.fromisoformat(at)
    return at.timestamp() if isinstance(at, datetime) else float(at)
