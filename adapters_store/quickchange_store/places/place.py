"""A place for a store's bytes: what `Store` needs of one, and what the places have in common.

A place knows no name: it keeps one index, which changes in steps, and versions by their digests.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from quickchange_store.canonical import adapter_bytes
from quickchange_store.errors import AdapterNotFoundError, CorruptVersionError
from quickchange_store.files import sync_directory, write_synced, written_synced
from quickchange_store.index import Index
from quickchange_store.info import AdapterInfo, describe

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter

T = TypeVar("T")
Step = Callable[[Index], tuple[Index, T]]  # a change; may be asked again with a newer index
Pause = Callable[[], None]  # called between pieces of work

ADAPTER_FILE = "adapter.safetensors"
INFO_FILE = "info.json"

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Removed versions that `Store.gc` still keeps, for readers that have just resolved them."""

    versions: int = 0
    bytes: int = 0
    until: float | None = None  # seconds since 1970, when the last of them may go; None: none waits


@dataclass(frozen=True, slots=True)
class Collected:
    """Versions and temporary entries that `Store.gc` removed, and what it keeps for a time."""

    versions: tuple[str, ...]  # digests
    temporaries: int
    bytes: int
    waiting: Waiting = Waiting()


@dataclass(frozen=True, slots=True)
class Staged:
    """A version that is written and not published: a folder with its two files."""

    directory: Path
    digest: str


class Notes(Protocol):
    """Small files beside the versions, each by a plain name."""

    def read(self, name: str) -> str | None:
        """The note, or None."""

    def write(self, name: str, text: str) -> None:
        """Write a note whole. Its time begins anew."""

    def remove(self, name: str) -> None:
        """Remove a note; one that is gone already is no error."""

    def times(self) -> dict[str, float]:
        """When each note was written, in seconds since 1970."""


class Place(Protocol):
    """One store's bytes. Safe for several threads and processes at once."""

    @property
    def location(self) -> str:
        """What names it: a folder's path or a URL."""

    @property
    def trouble(self) -> str | None:
        """Why the index that readers see may be old; None where it is not."""

    @property
    def exists(self) -> bool:
        """True if something was written here at some time."""

    def make(self) -> None:
        """Begin an empty store where there is none."""

    def look(self) -> None:
        """Have `index` give what is the newest now, as far as that can be read."""

    def index(self) -> Index:
        """The index as readers see it. Raises CorruptStoreError, StoreUnavailableError."""

    def change(self, step: Step[T], staged: Staged | None = None) -> T:
        """Replace the index by what `step` makes of the newest one, with nothing in between.

        `staged` is put into place before; what it raises then leaves the index as it was. Versions
        that the new index lacks begin to wait for `gc`, and so does a staged one that it does not
        name. Of no store, the index is empty, and a step that changes it fails.
        """

    def staged(
        self, adapter: CanonicalAdapter, base: BaseSpec | None
    ) -> AbstractContextManager[Staged]:
        """A version's files, written where they can be put into place from."""

    def file(self, digest: str, pause: Pause | None = None) -> Path:
        """A local file with a version's bytes, compared with their digest.

        Raises AdapterNotFoundError, CorruptVersionError, StoreUnavailableError.
        """

    def info(self, digest: str) -> AdapterInfo:
        """A version's figures. Raises as `file`."""

    def address(self, digest: str) -> str:
        """Where a version's bytes lie. Raises AdapterNotFoundError."""

    def original(self, digest: str) -> AbstractContextManager[Path]:
        """A folder with a version's files as they are kept, not looked into. Raises as `file`."""

    def keep(self, digest: str) -> bool:
        """Restart the time that a version waits for `gc`. False where there is none."""

    def discard(self, digest: str, min_age: float) -> None:
        """Remove a version now unless the index names it, or it came or was kept lately."""

    def collect(self, min_age: float) -> Collected:
        """Remove versions that the index has not named for `min_age` seconds, and remains."""

    def notes(self, folder: str) -> Notes:
        """The notes of this name."""


def checked_digest(digest: str) -> str:
    """The digest. Raises AdapterNotFoundError where it is none."""
    if _DIGEST.fullmatch(digest) is None:
        raise AdapterNotFoundError(
            "not a digest", key=digest[:80], remedy="give 64 hexadecimal digits"
        )
    return digest


def no_such_version(digest: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        "the store has no such version", key=digest, remedy="add the adapter again"
    )


def write_version(directory: Path, adapter: CanonicalAdapter, base: BaseSpec | None) -> Staged:
    """Write a version's two files, synced. Raises InvalidAdapterError, OSError."""
    with written_synced(directory / ADAPTER_FILE) as file:
        digest = adapter_bytes.write(adapter, file)
        size = file.tell()
    info = describe(adapter, digest, size=size, created=time.time(), base=base)
    write_synced(directory / INFO_FILE, info.encode())
    sync_directory(directory)
    return Staged(directory, digest)


def check_digest(path: Path, digest: str, pause: Pause | None = None, *, name: str = "") -> None:
    """Raise CorruptVersionError where the file's bytes have another digest. `name`: to show."""
    found = adapter_bytes.file_digest(path, pause)
    if found != digest:
        raise CorruptVersionError(
            f"the version is damaged: its content has the digest {found}",
            file=name or str(path),
            key=digest,
            remedy="add the adapter again: the same content repairs the version; "
            "`quickchange adapters verify` names every damaged one",
        )


def intact(directory: Path, digest: str) -> bool:
    """True if the folder holds the version's two files, whole."""
    try:
        check_digest(directory / ADAPTER_FILE, digest)
        AdapterInfo.read(directory / INFO_FILE)
    except CorruptVersionError:
        return False
    return True
