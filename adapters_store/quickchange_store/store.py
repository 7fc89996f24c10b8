"""A folder of adapter versions, addressed by content, shared by any number of processes.

    ROOT/
      index.json                       names, their versions, aliases; replaced whole
      lock                             held by whoever changes the index
      versions/ab/abcd…/               one version, by its digest; never changed once there
        adapter.safetensors            the canonical bytes; their SHA-256 is the digest
        info.json                      figures that need no tensor
      tmp/                             unfinished writes, abandoned ones included

Publishing writes a version under `tmp/`, syncs it, renames it into `versions/` and then replaces
`index.json`. A crash at any point leaves the old state or the new one; what it leaves under `tmp/`
or unreferenced under `versions/` is removed by `gc`. Readers take no lock: they see one index, and
versions do not change. Names live in the index alone, so no name is ever a file's name.

Knows nothing of formats, models, devices or HTTP.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical import canonical_adapter
from quickchange_store.errors import (
    AdapterNotFoundError,
    CorruptStoreError,
    CorruptVersionError,
    NameConflictError,
    NoStoreError,
    StoreError,
)
from quickchange_store.files import (
    abandoned,
    delete,
    exclusive_lock,
    held_directory,
    placed,
    replace_atomically,
    sync_directory,
    tree_size,
    write_synced,
)
from quickchange_store.index import (
    Alias,
    Index,
    IndexFile,
    Version,
    check_drafters,
    encode,
    no_version,
    pointed,
    previous,
    with_digest,
    without,
)
from quickchange_store.info import AdapterInfo, check_fit, describe
from quickchange_store.names import check_name, parse_reference

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter

INDEX_FILE, LOCK_FILE = "index.json", "lock"
ADAPTER_FILE = "adapter.safetensors"
INFO_FILE = "info.json"
GC_MIN_AGE = 3600.0  # seconds; longer than a reader takes between resolving and loading

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A resolved reference: the adapter's own name, the version's digest and its number."""

    name: str
    digest: str
    version: int
    turbo: str | None = None  # digest of the version whose heads draft by default, where one does


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that `Store.verify` found."""

    subject: str  # a version, an alias or a file
    what: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


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


class Store:
    """The adapters under `root`. Made on the first write; a missing folder reads as empty.

    Safe for several threads and processes at once. Every method raises CorruptStoreError where the
    index is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._index = IndexFile(root / INDEX_FILE)

    @classmethod
    def at(cls, root: Path) -> Store:
        """The store that is at `root`. Raises NoStoreError where there is none."""
        store = cls(root)
        if not store.exists:
            found = "" if root.is_dir() else ": no such folder"
            found = ": this is a file" if root.is_file() else found
            raise NoStoreError(
                f"no store here{found}",
                file=str(root),
                remedy="see the path; `quickchange adapters add` makes a store",
            )
        return store

    @property
    def exists(self) -> bool:
        """True if something was written to the store at some time."""
        return any(os.path.lexists(self.root / name) for name in (INDEX_FILE, LOCK_FILE))

    # --- reading --------------------------------------------------------------------------------

    def snapshot(self) -> Index:
        """All names, versions and aliases at one moment. One `stat` where nothing changed."""
        return self._index.read()

    def resolve(self, reference: str) -> Resolved:
        """The version that `NAME`, `NAME@NUMBER`, `NAME@DIGESTPREFIX` or an alias means now.

        Raises InvalidNameError, AdapterNotFoundError, AmbiguousVersionError.
        """
        index, parsed = self._index.read(), parse_reference(reference)
        version, drafter = index.find(parsed), index.drafting(parsed)
        turbo = None if drafter is None else drafter.digest
        return Resolved(version.name, version.digest, version.number, turbo)

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._index.read().entries))

    def versions(self, name: str) -> tuple[Version, ...]:
        """The versions of `name`, oldest first. Raises AdapterNotFoundError."""
        versions = self._index.read().entry(name).versions
        return tuple(versions[number] for number in sorted(versions))

    def aliases(self) -> dict[str, Alias]:
        """All aliases and what they point at, sorted."""
        return dict(sorted(self._index.read().aliases.items()))

    def path(self, digest: str) -> Path:
        """The file of a version. Raises AdapterNotFoundError where the store lacks it."""
        path = self._directory(digest) / ADAPTER_FILE
        if not path.is_file():
            raise AdapterNotFoundError(
                "the store has no such version", key=digest, remedy="add the adapter again"
            )
        return path

    def load(self, digest: str, *, verify: bool = False) -> CanonicalAdapter:
        """The adapter with this digest, memory-mapped.

        `verify` reads it all and compares the digest first. Raises AdapterNotFoundError and
        CorruptVersionError.
        """
        path = self.path(digest)
        if verify:
            _check_digest(path, digest)
        info = self.info(digest)
        return canonical_adapter.load(path, base_name=info.base_name, source=dict(info.source))

    def info(self, digest: str) -> AdapterInfo:
        """The figures of a version; reads no tensor.

        Raises AdapterNotFoundError and CorruptVersionError.
        """
        self.path(digest)
        return AdapterInfo.read(self._directory(digest) / INFO_FILE)

    # --- changing -------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the store where there is none yet. Raises OSError."""
        if not self.exists:
            self._tmp.mkdir(parents=True, exist_ok=True)
            (self.root / LOCK_FILE).touch()

    def add(self, name: str, adapter: CanonicalAdapter, base: BaseSpec | None = None) -> Version:
        """Publish `adapter` as the version that `name` serves from now on.

        `base` is the model that it was checked against, whose sizes its info keeps. Content that
        the name already has keeps its number and becomes current again. Raises InvalidNameError,
        NameConflictError (the name is an alias), InvalidAdapterError, and InUseError where an alias
        drafts with `name` and the adapter has no heads.
        """
        check_name(name)
        self._refuse_alias(self._index.read(), name)
        with self._staged(adapter, base) as (staged, digest), self._writing() as index:
            self._refuse_alias(index, name)
            heads = adapter.turbo is not None
            entry = with_digest(index.entries.get(name), name, digest, turbo=heads)
            new = replace(index, entries={**index.entries, name: entry})
            check_drafters(new)
            with self._published(staged, digest):
                self._commit(index, new)
        return entry.versions[entry.current]

    def rollback(self, name: str, version: int | None = None) -> Version:
        """Let `name` serve `version`, or the one before the current. Aliases to `name` follow.

        Raises AdapterNotFoundError, and InUseError where an alias drafts with `name` and that
        version has no heads.
        """
        with self._writing() as index:
            entry = index.entry(name)
            number = previous(name, entry) if version is None else version
            if number not in entry.versions:
                raise no_version(name, entry, number)
            moved = replace(entry, current=number)
            new = replace(index, entries={**index.entries, name: moved})
            check_drafters(new)
            self._commit(index, new)
        return entry.versions[number]

    def alias(self, alias: str, target: str, turbo: str | None = None) -> Alias:
        """Point `alias` at `NAME` (whatever it serves) or at `NAME@VERSION`, in one step.

        `turbo` names the heads that draft for it in the same way; without it, those of the target
        do, where it has any. Raises InvalidNameError, AdapterNotFoundError, NameConflictError where
        `alias` is a name, or `target` or `turbo` an alias, InvalidAdapterError where `turbo` has no
        heads, and BaseMismatchError where its heads are for another base model than the target.
        """
        check_name(alias, what="alias")
        with self._writing() as index:
            if alias in index.entries:
                raise NameConflictError(
                    "an adapter has this name", key=alias, remedy="choose another alias"
                )
            version, number = pointed(index, target)
            pointer = Alias(version.name, number)
            if turbo is not None:
                drafter, stays = pointed(index, turbo)
                check_fit(drafter, self.info(drafter.digest), self.info(version.digest))
                pointer = replace(pointer, turbo=str(Alias(drafter.name, stays)))
            self._commit(index, replace(index, aliases={**index.aliases, alias: pointer}))
        return pointer

    def unalias(self, alias: str) -> None:
        """Remove an alias. Raises AdapterNotFoundError."""
        with self._writing() as index:
            if alias not in index.aliases:
                raise AdapterNotFoundError(
                    "no such alias", key=alias, remedy="see `quickchange adapters list`"
                )
            kept = {name: target for name, target in index.aliases.items() if name != alias}
            self._commit(index, replace(index, aliases=kept))

    def remove(self, reference: str) -> tuple[Version, ...]:
        """Remove a name or one version of it; `gc` frees the space later. Returns the versions.

        Raises InvalidNameError, AdapterNotFoundError, and InUseError where an alias points at it
        or where it is the version that the name serves while there are others.
        """
        parsed = parse_reference(reference)
        with self._writing() as index:
            self._refuse_alias(index, parsed.name)
            entry = index.entry(parsed.name)
            if parsed.selector is None:
                gone = tuple(entry.versions.values())
            else:
                gone = (index.find(parsed),)
            left = without(index, entry, gone)
            for digest in {version.digest for version in gone} - left.digests():
                self._mark_unreferenced(digest)
            self._commit(index, left)
        return gone

    # --- versions without a name ----------------------------------------------------------------

    def publish(self, adapter: CanonicalAdapter) -> str:
        """Publish `adapter` under no name and return its digest.

        Such a version is not listed, and `gc` removes it as unreferenced unless `keep` is called
        now and then. Raises InvalidAdapterError.
        """
        with (
            self._staged(adapter, None) as (staged, digest),
            self._writing(),
            self._published(staged, digest),
        ):
            self._mark_unreferenced(digest)
        return digest

    def keep(self, digest: str) -> bool:
        """Restart a version's time until `gc` may remove it. False where the store lacks it."""
        with self._writing():
            there = self._directory(digest).exists()
            self._mark_unreferenced(digest)
        return there

    def discard(self, digest: str) -> None:
        """Remove a version now, unless a name refers to it."""
        with self._writing() as index:
            path = self._directory(digest)
            if digest in index.digests() or not path.exists():
                return
            trash = path.rename(self._tmp / f"{digest}.{secrets.token_hex(8)}")
            delete(trash)

    # --- upkeep ---------------------------------------------------------------------------------

    def verify(self) -> list[Problem]:
        """Recompute every digest and check every pointer; an empty list where all is well."""
        try:
            index = self._index.read()
        except CorruptStoreError as error:
            return [Problem(str(self._index.path), str(error))]
        problems = []
        for digest in sorted(index.digests()):
            names = ", ".join(
                str(version)
                for entry in index.entries.values()
                for version in entry.versions.values()
                if version.digest == digest
            )
            try:
                self.load(digest, verify=True)
            except StoreError as error:
                problems.append(Problem(names, str(error)))
        return problems

    def gc(self, min_age: float = GC_MIN_AGE) -> Collected:
        """Remove versions unreferenced for `min_age` seconds, and the files of dead writers.

        Safe beside writers: files of a living writer are never touched. A reader that resolved a
        name before it was removed has `min_age` to load it.
        """
        if not self.exists:
            return Collected((), 0, 0)
        before = time.time() - min_age
        with self._writing() as index:
            dead = [path for path in self._temporaries() if abandoned(path, before)]
            unreferenced = self._unreferenced(index)
            old = [p for p in unreferenced if p.stat().st_mtime <= before]
            kept = [p for p in unreferenced if p not in old]
            until = max((p.stat().st_mtime + min_age for p in kept), default=None)
            waiting = Waiting(len(kept), sum(map(tree_size, kept)), until)
            # Moved in one step first: a crash while deleting never leaves half a version.
            trash = [p.rename(self._tmp / f"{p.name}.{secrets.token_hex(8)}") for p in old]
            freed = sum(tree_size(path) for path in [*dead, *trash])
            for path in [*dead, *trash]:
                delete(path)
        return Collected(tuple(path.name for path in old), len(dead), freed, waiting)

    # --- internal -------------------------------------------------------------------------------

    @property
    def _tmp(self) -> Path:
        return self.root / "tmp"

    def _directory(self, digest: str) -> Path:
        if _DIGEST.fullmatch(digest) is None:
            raise AdapterNotFoundError(
                "not a digest", key=digest[:80], remedy="give 64 hexadecimal digits"
            )
        return self.root / "versions" / digest[:2] / digest

    @contextmanager
    def _writing(self) -> Iterator[Index]:
        """Hold the writers' lock, with the current index; of no store, an empty one and no lock.

        Only an adapter's first bytes make a store: what changes or removes finds nothing in it.
        """
        if not self.exists:
            yield self._index.read()
            return
        with placed(self.root):
            self._tmp.mkdir(exist_ok=True)
            with exclusive_lock(self.root / LOCK_FILE):
                yield self._index.read()

    def _commit(self, old: Index, new: Index) -> None:
        if new != old:
            replace_atomically(self._index.path, encode(new), self._tmp)

    @contextmanager
    def _staged(
        self, adapter: CanonicalAdapter, base: BaseSpec | None
    ) -> Iterator[tuple[Path, str]]:
        """Write a whole version directory under `tmp/`, synced; gives the path and the digest."""
        directory = self._tmp / secrets.token_hex(16)
        with ExitStack() as stack:
            stack.enter_context(placed(self.root))
            self.make()
            with self._writing():  # keeps gc out until the directory is held
                stack.enter_context(held_directory(directory))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            with (directory / ADAPTER_FILE).open("xb") as file:
                digest = canonical_adapter.write(adapter, file)
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            info = describe(adapter, digest, size=size, created=time.time(), base=base)
            write_synced(directory / INFO_FILE, info.encode())
            sync_directory(directory)
            yield directory, digest

    @contextmanager
    def _published(self, staged: Path, digest: str) -> Iterator[None]:
        """Move a staged version into place; a new one is taken away again if the body fails."""
        target = self._directory(digest)
        new = not target.exists()
        try:
            self._publish(staged, target, digest)
            yield
        except OSError:  # a full disk: the version would lie there until gc
            if new and digest not in self._index.read().digests():
                shutil.rmtree(target, ignore_errors=True)
            raise

    def _publish(self, staged: Path, target: Path, digest: str) -> None:
        """Move a staged version into place; a damaged one that is there is replaced."""
        if target.exists():
            if _intact(target, digest):
                return
            target.rename(self._tmp / f"{digest}.{secrets.token_hex(8)}")
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            sync_directory(target.parent.parent)
            sync_directory(self.root)
        staged.rename(target)
        sync_directory(target.parent)

    def _refuse_alias(self, index: Index, name: str) -> None:
        if name in index.aliases:
            raise NameConflictError(
                "this is an alias",
                key=name,
                remedy="use the adapter's own name, or remove the alias first",
            )

    def _mark_unreferenced(self, digest: str) -> None:
        """Start the version's time until `gc` may remove it."""
        directory = self._directory(digest)
        if directory.exists():
            directory.touch()

    def _unreferenced(self, index: Index) -> list[Path]:
        kept = index.digests()
        return [p for p in (self.root / "versions").glob("??/*") if p.name not in kept]

    def _temporaries(self) -> list[Path]:
        return list(self._tmp.iterdir())


def _check_digest(path: Path, digest: str) -> None:
    found = canonical_adapter.file_digest(path)
    if found != digest:
        raise CorruptVersionError(
            f"its content has the digest {found}",
            file=str(path),
            key=digest,
            remedy="add the adapter again: the same content repairs the version",
        )


def _intact(directory: Path, digest: str) -> bool:
    try:
        _check_digest(directory / ADAPTER_FILE, digest)
        AdapterInfo.read(directory / INFO_FILE)
    except CorruptVersionError:
        return False
    return True
