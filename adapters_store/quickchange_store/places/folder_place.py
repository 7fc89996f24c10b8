"""A store in a folder, shared by any number of processes.

    ROOT/
      index.json                       names, their versions, aliases; replaced whole
      lock                             held by whoever changes the index
      versions/ab/abcd…/               one version, by its digest; never changed once there
        adapter.safetensors            the canonical bytes; their SHA-256 is the digest
        info.json                      figures that need no tensor
      tmp/                             unfinished writes, abandoned ones included

Publishing writes a version under `tmp/`, syncs it, renames it into `versions/` and then replaces
`index.json`. A crash at any point leaves the old state or the new one; what it leaves under `tmp/`
or unreferenced under `versions/` is removed by `collect`. Readers take no lock: they see one index,
and versions do not change. Names live in the index alone, so no name is ever a file's name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.files import (
    abandoned,
    delete,
    exclusive_lock,
    held_directory,
    placed,
    replace_atomically,
    sync_directory,
    tree_size,
)
from quickchange_store.index import Index, encode
from quickchange_store.info import AdapterInfo
from quickchange_store.places.index_file import IndexFile
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

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter

INDEX_FILE, LOCK_FILE = "index.json", "lock"


class FolderPlace:
    """A `Place` under `root`. Made on the first write; a missing folder reads as empty."""

    trouble: str | None = None  # each read is of the index as it is

    def __init__(self, root: Path) -> None:
        self._root = root
        self._index = IndexFile(root / INDEX_FILE)

    @property
    def location(self) -> str:
        return str(self._root)

    @property
    def exists(self) -> bool:
        return any(os.path.lexists(self._root / name) for name in (INDEX_FILE, LOCK_FILE))

    def make(self) -> None:
        if not self.exists:
            self._tmp.mkdir(parents=True, exist_ok=True)
            (self._root / LOCK_FILE).touch()

    # --- index ----------------------------------------------------------------------------------

    def look(self) -> None:
        """Nothing: the index is read where its file has changed."""

    def index(self) -> Index:
        return self._index.read()

    def change(self, step: Step[T], staged: Staged | None = None) -> T:
        with self._writing() as index:
            new, result = step(index)
            incoming = set() if staged is None else {staged.digest}
            with self._published(staged):
                for digest in (index.digests() | incoming) - new.digests():
                    self._mark_unreferenced(digest)
                if new != index:
                    replace_atomically(self._index.path, encode(new), self._tmp)
        return result

    @contextmanager
    def _writing(self) -> Iterator[Index]:
        """Hold the writers' lock, with the current index; of no store, an empty one and no lock.

        Only an adapter's first bytes make a store: what changes or removes finds nothing in it.
        """
        if not self.exists:
            yield self._index.read()
            return
        with placed(self._root):
            self._tmp.mkdir(exist_ok=True)
            with exclusive_lock(self._root / LOCK_FILE):
                yield self._index.read()

    # --- versions -------------------------------------------------------------------------------

    @contextmanager
    def staged(self, adapter: CanonicalAdapter, base: BaseSpec | None) -> Iterator[Staged]:
        directory = self._tmp / secrets.token_hex(16)
        with ExitStack() as stack:
            stack.enter_context(placed(self._root))
            self.make()
            with self._writing():  # keeps `collect` out until the directory is held
                stack.enter_context(held_directory(directory))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            yield write_version(directory, adapter, base)

    @contextmanager
    def _published(self, staged: Staged | None) -> Iterator[None]:
        """Move a staged version into place; a new one is taken away again if the body fails."""
        if staged is None:
            yield
            return
        target = self._directory(staged.digest)
        new = not target.exists()
        try:
            self._publish(staged, target)
            yield
        except OSError:  # a full disk: the version would lie there until it is collected
            if new and staged.digest not in self._index.read().digests():
                shutil.rmtree(target, ignore_errors=True)
            raise

    def _publish(self, staged: Staged, target: Path) -> None:
        """Move a staged version into place; a damaged one that is there is replaced."""
        if target.exists():
            if intact(target, staged.digest):
                return
            target.rename(self._trash(staged.digest))
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            sync_directory(target.parent.parent)
            sync_directory(self._root)
        staged.directory.rename(target)
        sync_directory(target.parent)

    def file(self, digest: str, pause: Pause | None = None) -> Path:
        path = Path(self.address(digest))
        check_digest(path, digest, pause)
        return path

    def info(self, digest: str) -> AdapterInfo:
        return AdapterInfo.read(Path(self.address(digest)).with_name(INFO_FILE))

    def address(self, digest: str) -> str:
        path = self._directory(digest) / ADAPTER_FILE
        if not path.is_file():
            raise no_such_version(digest)
        return str(path)

    @contextmanager
    def original(self, digest: str) -> Iterator[Path]:
        yield Path(self.address(digest)).parent

    def keep(self, digest: str) -> bool:
        with self._writing():
            there = self._directory(digest).exists()
            self._mark_unreferenced(digest)
        return there

    def discard(self, digest: str, min_age: float) -> None:
        before = time.time() - min_age
        with self._writing() as index:
            path = self._directory(digest)
            if digest in index.digests() or not path.exists():
                return
            if path.stat().st_mtime <= before:
                delete(path.rename(self._trash(digest)))

    # --- upkeep ---------------------------------------------------------------------------------

    def collect(self, min_age: float) -> Collected:
        """Files of a living writer are never touched."""
        if not self.exists:
            return Collected((), 0, 0)
        before = time.time() - min_age
        with self._writing() as index:
            dead = [path for path in self._tmp.iterdir() if abandoned(path, before)]
            unreferenced = self._unreferenced(index)
            old = [p for p in unreferenced if p.stat().st_mtime <= before]
            kept = [p for p in unreferenced if p not in old]
            until = max((p.stat().st_mtime + min_age for p in kept), default=None)
            waiting = Waiting(len(kept), sum(map(tree_size, kept)), until)
            # Moved in one step first: a crash while deleting never leaves half a version.
            trash = [p.rename(self._trash(p.name)) for p in old]
            freed = sum(tree_size(path) for path in [*dead, *trash])
            for path in [*dead, *trash]:
                delete(path)
        return Collected(tuple(path.name for path in old), len(dead), freed, waiting)

    def _unreferenced(self, index: Index) -> list[Path]:
        kept = index.digests()
        return [p for p in (self._root / "versions").glob("??/*") if p.name not in kept]

    def _mark_unreferenced(self, digest: str) -> None:
        """Start the version's time until it may be collected."""
        directory = self._directory(digest)
        if directory.exists():
            directory.touch()

    # --- notes ----------------------------------------------------------------------------------

    def notes(self, folder: str) -> FolderNotes:
        return FolderNotes(self._root / folder, self._tmp)

    # --- internal -------------------------------------------------------------------------------

    @property
    def _tmp(self) -> Path:
        return self._root / "tmp"

    def _trash(self, digest: str) -> Path:
        return self._tmp / f"{digest}.{secrets.token_hex(8)}"

    def _directory(self, digest: str) -> Path:
        return self._root / "versions" / digest[:2] / checked_digest(digest)


class FolderNotes:
    """`Notes` as files of one folder."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch

    def read(self, name: str) -> str | None:
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(self._folder / name, text.encode(), self._scratch)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def times(self) -> dict[str, float]:
        """Raises nothing where others remove notes meanwhile."""
        found = {}
        for path in self._folder.glob("*"):
            try:
                found[path.name] = path.stat().st_mtime
            except FileNotFoundError:
                continue
        return found
