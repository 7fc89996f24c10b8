"""A store as objects under a URL, shared by any number of machines.

    URL/
      index/000000000042.json          names, versions, aliases: see `index_objects`
      versions/ab/abcd…/7/             one version, by its digest and the epoch of its upload
        adapter.safetensors            the canonical bytes; their SHA-256 is the digest
        info.json                      figures that need no tensor; written last
      kept/abcd…                       its time is when the version began to wait for `collect`

There are no locks. A version's objects are there before the index names them, so that a crash
leaves the old state or the new one. Whoever removes versions raises the index's epoch first, and
removes only those that this very index does not name, from that epoch or an earlier one. A writer
whose commit comes later sees the new epoch and uploads its version under it, so that it never
names what another is about to remove.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.errors import AdapterNotFoundError, CorruptVersionError
from quickchange_store.files import held_directory, placed
from quickchange_store.index import Index
from quickchange_store.info import AdapterInfo
from quickchange_store.places.index_objects import IndexObjects, State
from quickchange_store.places.objects import Objects, Stored
from quickchange_store.places.place import (
    ADAPTER_FILE,
    INFO_FILE,
    Collected,
    Pause,
    Staged,
    Step,
    T,
    Waiting,
    check_digest,
    checked_digest,
    intact,
    no_such_version,
    write_version,
)
from quickchange_store.places.version_cache import VersionCache

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter

logger = logging.getLogger(__name__)

_LISTING_SECONDS = 600.0  # of all versions, for `collect`
_TOGETHER = 16  # infos read at once

Upload = dict[str, Stored]  # an upload's objects, by their files' names


class BucketPlace:
    """A `Place` on objects, with versions fetched through `cache`."""

    def __init__(self, objects: Objects, cache: VersionCache) -> None:
        self._objects = objects
        self._cache = cache
        self._label = hashlib.sha256(objects.shown.encode()).hexdigest()[:16]
        self._infos: dict[str, AdapterInfo] = {}
        self._indexes = IndexObjects(objects, self._prepare)

    @property
    def location(self) -> str:
        return self._objects.shown

    @property
    def trouble(self) -> str | None:
        return self._indexes.trouble

    @property
    def exists(self) -> bool:
        return self._indexes.seen().number > 0

    def make(self) -> None:
        while not (newest := self._indexes.newest()).number:
            self._indexes.commit(newest, newest.index)

    # --- index ----------------------------------------------------------------------------------

    def look(self) -> None:
        self._indexes.look()

    def index(self) -> Index:
        return self._indexes.seen().index

    def change(self, step: Step[T], staged: Staged | None = None) -> T:
        incoming = set() if staged is None else {staged.digest}
        uploaded = False
        while True:
            newest = self._indexes.newest()
            new, result = step(newest.index)
            if staged is not None:
                uploaded |= self._upload(staged, newest)
            for digest in (newest.index.digests() | incoming) - new.digests():
                self._mark_unreferenced(digest)
            if new == newest.index or self._indexes.commit(newest, new):
                break
        if staged is not None:
            self._keep_fetched(staged, uploaded)
        return result

    def _prepare(self, index: Index) -> None:
        """Have at hand the infos that servers ask for between two tokens: those of Turbos."""
        turbos = {
            version.digest
            for entry in index.entries.values()
            for version in entry.versions.values()
            if version.turbo
        }
        with ThreadPoolExecutor(_TOGETHER) as readers:
            asked = {d: readers.submit(self.info, d) for d in turbos - self._infos.keys()}
        found = {digest: info for digest, info in self._infos.items() if digest in turbos}
        for digest, reading in asked.items():
            try:
                found[digest] = reading.result()
            except (AdapterNotFoundError, CorruptVersionError) as error:
                logger.warning("a version that a name refers to is damaged: %s", error)
        self._infos = found

    # --- versions -------------------------------------------------------------------------------

    @contextmanager
    def staged(self, adapter: CanonicalAdapter, base: BaseSpec | None) -> Iterator[Staged]:
        self.make()
        with placed(self._cache.folder), self._scratch() as directory:
            yield write_version(directory, adapter, base)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        directory = self._cache.scratch()
        with held_directory(directory):
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)

    def _upload(self, staged: Staged, newest: State) -> bool:
        """Have the version under the newest epoch, or under any where the index names it.

        False where it was there already, with its own figures.
        """
        digest, epoch = staged.digest, newest.epoch
        uploads = self._uploads(digest)
        if digest in newest.index.digests():
            epoch = max(uploads, default=epoch)
        if self._intact(digest, uploads.get(epoch)):
            return False
        for name in (ADAPTER_FILE, INFO_FILE):  # the last makes it whole
            self._objects.upload(staged.directory / name, f"{_folder(digest)}/{epoch}/{name}")
        return True

    def _intact(self, digest: str, upload: Upload | None) -> bool:
        if upload is None or len(upload) < 2:
            return False
        with self.original(digest) as directory:
            return intact(directory, digest)

    def _keep_fetched(self, staged: Staged, uploaded: bool) -> None:
        """Put what was staged into the cache: an engine of this machine needs no download."""
        files = {self._bytes_name(staged.digest): ADAPTER_FILE}
        if uploaded:
            files[self._info_name(staged.digest)] = INFO_FILE
        for name, file in files.items():
            self._cache.drop(name)  # one that is damaged
            self._cache.fetched(name, partial(_moved, staged.directory / file))

    def file(self, digest: str, pause: Pause | None = None) -> Path:
        name = self._bytes_name(checked_digest(digest))
        cached = self._cache.find(name)
        if cached is not None:
            try:
                check_digest(cached, digest, pause)
                return cached
            except CorruptVersionError:
                self._cache.drop(name)
        return self._cache.fetched(name, lambda path: self._download(digest, path, pause))

    def _download(self, digest: str, path: Path, pause: Pause | None) -> None:
        """Fetch a version's bytes, once more where they arrive damaged."""
        key, stored = self._stored(digest, ADAPTER_FILE)
        for last in (False, True):
            self._objects.download(key, path, stored.size)
            try:
                check_digest(path, digest, pause, name=self._objects.address(key))
                return
            except CorruptVersionError:
                if last:
                    raise

    def info(self, digest: str) -> AdapterInfo:
        if digest in self._infos:
            return self._infos[digest]
        name = self._info_name(checked_digest(digest))
        cached = self._cache.find(name)
        if cached is not None:
            try:
                return AdapterInfo.read(cached)
            except CorruptVersionError:
                self._cache.drop(name)
        return AdapterInfo.read(self._cache.fetched(name, lambda path: self._info(digest, path)))

    def _info(self, digest: str, path: Path) -> None:
        key, stored = self._stored(digest, INFO_FILE)
        self._objects.download(key, path, stored.size)
        AdapterInfo.read(path)

    def address(self, digest: str) -> str:
        return self._objects.address(self._stored(digest, ADAPTER_FILE)[0])

    @contextmanager
    def original(self, digest: str) -> Iterator[Path]:
        with placed(self._cache.folder), self._scratch() as directory:
            for name in (ADAPTER_FILE, INFO_FILE):
                key, stored = self._stored(digest, name)
                self._objects.download(key, directory / name, stored.size)
            yield directory

    def _stored(self, digest: str, name: str) -> tuple[str, Stored]:
        """A version's object of the last whole upload. Raises AdapterNotFoundError."""
        uploads = self._uploads(checked_digest(digest))
        epoch = max((epoch for epoch, upload in uploads.items() if len(upload) == 2), default=None)
        if epoch is None:
            raise no_such_version(digest)
        return f"{_folder(digest)}/{epoch}/{name}", uploads[epoch][name]

    def _uploads(self, digest: str) -> dict[int, Upload]:
        return _by_epoch(self._objects.under(_folder(digest)))

    def keep(self, digest: str) -> bool:
        if not self._uploads(checked_digest(digest)):
            return False
        self._mark_unreferenced(digest)  # and only then looked up: it may go in between
        return any(len(upload) == 2 for upload in self._uploads(digest).values())

    def _mark_unreferenced(self, digest: str) -> None:
        self._objects.write(_mark(checked_digest(digest)), b"")

    def discard(self, digest: str, min_age: float) -> None:
        listed = self._objects.under(_folder(checked_digest(digest)))
        if not listed:
            return
        state = self._raised_epoch()
        mark = self._objects.under("kept").get(_mark(digest))
        since = max(stored.modified for stored in (*listed.values(), *filter(None, [mark])))
        if digest not in state.index.digests() and since <= self._indexes.modified(state) - min_age:
            self._objects.remove([*_last_first(listed), _mark(digest)])

    # --- upkeep ---------------------------------------------------------------------------------

    def _raised_epoch(self) -> State:
        """The newest index, written again under the next epoch."""
        while True:
            newest = self._indexes.newest()
            raised = self._indexes.commit(newest, newest.index, newest.epoch + 1)
            if raised is not None:
                return raised

    def collect(self, min_age: float) -> Collected:
        if not self._indexes.newest().number:
            return Collected((), 0, 0)
        listed = _by_digest(self._objects.under("versions", _LISTING_SECONDS))
        state = self._raised_epoch()
        now = self._indexes.modified(state)
        marks = {
            key.removeprefix("kept/"): mark.modified
            for key, mark in self._objects.under("kept").items()
        }
        named = state.index.digests()
        waiting = {
            digest: max([marks.get(digest, 0.0), *(o.modified for o in objects.values())])
            for digest, objects in listed.items()
            if digest not in named
        }
        old = [digest for digest, since in waiting.items() if since <= now - min_age]
        whole = [d for d in old if any(len(u) == 2 for u in _by_epoch(listed[d]).values())]
        for digest in old:
            self._objects.remove([*_last_first(listed[digest]), _mark(digest)])
        for digest in listed.keys() & named:
            self._objects.remove(_superseded(listed[digest], now - min_age))
        self._objects.remove(
            _mark(digest)
            for digest, at in marks.items()
            if digest not in waiting and at <= now - min_age
        )
        kept = {digest: since for digest, since in waiting.items() if digest not in old}
        parts = self._objects.abort_uploads(now - min_age)
        temporaries = len(old) - len(whole) + parts + self._indexes.trim(now)
        until = max((since + min_age for since in kept.values()), default=None)
        left = Waiting(len(kept), sum(_size(listed[digest]) for digest in kept), until)
        freed = sum(_size(listed[digest]) for digest in old)
        return Collected(tuple(sorted(whole)), temporaries, freed, left)

    # --- notes ----------------------------------------------------------------------------------

    def notes(self, folder: str) -> ObjectNotes:
        return ObjectNotes(self._objects, f"notes/{folder}")

    # --- names in the cache: bytes are the same for all stores, infos are each store's own ------

    def _bytes_name(self, digest: str) -> str:
        return f"{digest}.safetensors"

    def _info_name(self, digest: str) -> str:
        return f"{digest}.{self._label}.json"


class ObjectNotes:
    """`Notes` as objects of one folder."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self._folder = folder

    def read(self, name: str) -> str | None:
        content = self._objects.read(f"{self._folder}/{name}")
        return None if content is None else content.decode()

    def write(self, name: str, text: str) -> None:
        self._objects.write(f"{self._folder}/{name}", text.encode())

    def remove(self, name: str) -> None:
        self._objects.remove([f"{self._folder}/{name}"])

    def times(self) -> dict[str, float]:
        found = self._objects.under(self._folder)
        return {key.rpartition("/")[2]: note.modified for key, note in found.items()}


def _moved(source: Path, path: Path) -> None:
    source.rename(path)


def _folder(digest: str) -> str:
    return f"versions/{digest[:2]}/{digest}"


def _mark(digest: str) -> str:
    return f"kept/{digest}"


def _by_digest(listed: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in listed.items():
        found.setdefault(key.split("/")[2], {})[key] = stored
    return found


def _by_epoch(listed: dict[str, Stored]) -> dict[int, Upload]:
    """The objects of one version: each upload's, by their names."""
    found: dict[int, Upload] = {}
    for key, stored in listed.items():
        epoch, name = key.split("/")[3:5]
        found.setdefault(int(epoch), {})[name] = stored
    return found


def _last_first(keys: dict[str, Stored]) -> list[str]:
    """The keys in an order that leaves no whole version while some are removed."""
    return sorted(keys, reverse=True)  # info.json before adapter.safetensors


def _superseded(listed: dict[str, Stored], before: float) -> list[str]:
    """Old objects of uploads before the last whole one, which alone is read."""
    epochs = _by_epoch(listed)
    last = max((epoch for epoch, upload in epochs.items() if len(upload) == 2), default=0)
    return [
        key
        for key, stored in listed.items()
        if int(key.split("/")[3]) < last and stored.modified <= before
    ]


def _size(listed: dict[str, Stored]) -> int:
    return sum(stored.size for stored in listed.values())
