"""The store: adapters by name and version, wherever their bytes lie.

Names, versions and aliases are one immutable index; versions are addressed by content. Where both
lie is a `Place`: a folder that processes share, or objects under a URL.

Knows nothing of formats, models, devices or HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical import adapter_bytes
from quickchange_store.errors import (
    AdapterNotFoundError,
    CorruptStoreError,
    NameConflictError,
    NoStoreError,
    StoreError,
)
from quickchange_store.index import (
    Alias,
    Index,
    Traits,
    Version,
    check_drafters,
    no_version,
    pointed,
    previous,
    with_digest,
    without,
)
from quickchange_store.info import AdapterInfo, check_fit
from quickchange_store.names import check_name, did_you_mean, parse_reference
from quickchange_store.places.locations import place_of
from quickchange_store.places.place import (
    ADAPTER_FILE,
    INFO_FILE,
    Collected,
    Notes,
    check_digest,
)

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
    from quickchange_store.canonical.classifier_part import ClassifierHead
    from quickchange_store.canonical.tokenizer_part import TokenizerChanges

GC_MIN_AGE = 3600.0  # seconds; longer than a reader takes between resolving and loading


@dataclass(frozen=True, slots=True)
class Resolved:
    """A resolved reference: the adapter's own name, the version's digest and its number."""

    name: str
    digest: str
    version: int
    turbo: str | None  # digest of the version whose heads draft by default, where one does
    served: tuple[str, ...]  # digests of what is on the device for it: its terms, or itself


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that `Store.verify` found."""

    subject: str  # a version, an alias or a file
    what: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


class Store:
    """The adapters at `location`: a folder or a URL. Made on the first write; none reads as empty.

    `cache`: where versions of a URL's store are kept once fetched, `cache_bytes` at most; default:
    QUICKCHANGE_STORE_CACHE and QUICKCHANGE_STORE_CACHE_BYTES, or a folder under the user's cache.

    Safe for several threads and processes at once. Every method raises CorruptStoreError where the
    index is damaged and, where the store is far, StoreUnavailableError; making one raises
    StoreLocationError.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._place = place_of(location, cache, cache_bytes)
        # arguments that open it again in another process
        self.opening = (self.location, None if cache is None else os.fspath(cache), cache_bytes)

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Store:
        """The store that is at `location`. Raises NoStoreError where there is none."""
        store = cls(location)
        if not store.exists:
            place = Path(store.location)
            found = "" if "://" in store.location or place.is_dir() else ": no such folder"
            found = ": this is a file" if place.is_file() else found
            raise NoStoreError(
                f"no store here{found}",
                file=store.location,
                remedy="see the path; `quickchange adapters add` makes a store",
            )
        return store

    @property
    def location(self) -> str:
        """The folder's path, or the URL."""
        return self._place.location

    @property
    def exists(self) -> bool:
        """True if something was written to the store at some time."""
        return self._place.exists

    @property
    def trouble(self) -> str | None:
        """Why names may be older than they should be; None where they are not."""
        return self._place.trouble

    # --- reading --------------------------------------------------------------------------------

    def snapshot(self) -> Index:
        """All names, versions and aliases at one moment.

        Of a folder the newest, by one `stat` where nothing changed. Of a URL what was the newest
        less than a second ago, from memory once it was read; the last that was read where the URL
        can't be reached.
        """
        return self._place.index()

    def resolve(self, reference: str) -> Resolved:
        """The version that `NAME`, `NAME@NUMBER`, `NAME@DIGESTPREFIX` or an alias means now.

        Raises InvalidNameError, AdapterNotFoundError, AmbiguousVersionError.
        """
        index, parsed = self._place.index(), parse_reference(reference)
        version, drafter = index.find(parsed), index.drafting(parsed)
        turbo = None if drafter is None else drafter.digest
        return Resolved(version.name, version.digest, version.number, turbo, version.served)

    def look(self) -> None:
        """Read what another process may have published just now."""
        self._place.look()

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._place.index().entries))

    def versions(self, name: str) -> tuple[Version, ...]:
        """The versions of `name`, oldest first. Raises AdapterNotFoundError."""
        versions = self._place.index().entry(name).versions
        return tuple(versions[number] for number in sorted(versions))

    def aliases(self) -> dict[str, Alias]:
        """All aliases and what they point at, sorted."""
        return dict(sorted(self._place.index().aliases.items()))

    def path(self, digest: str) -> Path:
        """A local file with a version's bytes, verified. Raises as `load`."""
        return self._place.file(digest)

    def address(self, digest: str) -> str:
        """Where the bytes of a version lie. Raises AdapterNotFoundError."""
        return self._place.address(digest)

    def load(self, digest: str, pause: Callable[[], None] | None = None) -> CanonicalAdapter:
        """The adapter with this digest, memory-mapped, after all its bytes were compared with it.

        pause: called between pieces of that work. Raises AdapterNotFoundError and
        CorruptVersionError.
        """
        path = self._place.file(digest, pause)
        info = self.info(digest)
        return adapter_bytes.load(path, base_name=info.base_name, source=dict(info.source))

    def classifier(self, digest: str) -> ClassifierHead | None:
        """The classification head of a version, without torch; None where it has none.

        Raises as `load`.
        """
        return adapter_bytes.load_classifier(self._place.file(digest))

    def tokenizer(self, digest: str) -> TokenizerChanges | None:
        """What a version's tokenizer adds to the base's, without torch; None where nothing.

        Raises as `load`.
        """
        return adapter_bytes.load_tokenizer(self._place.file(digest))

    def info(self, digest: str) -> AdapterInfo:
        """The figures of a version; reads no tensor.

        Raises AdapterNotFoundError and CorruptVersionError.
        """
        return self._place.info(digest)

    # --- changing -------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the store where there is none yet. Raises OSError."""
        self._place.make()

    def add(self, name: str, adapter: CanonicalAdapter, base: BaseSpec | None = None) -> Version:
        """Publish `adapter` as the version that `name` serves from now on.

        `base` is the model that it was checked against, whose sizes its info keeps. Content that
        the name already has keeps its number and becomes current again. Raises InvalidNameError,
        NameConflictError (the name is an alias), InvalidAdapterError, and InUseError where an alias
        drafts with `name` and the adapter has no heads.
        """
        check_name(name)
        _refuse_alias(self._place.index(), name)
        traits = Traits.of(adapter)
        with self._place.staged(adapter, base) as staged:

            def named(index: Index) -> tuple[Index, Version]:
                _refuse_alias(index, name)
                entry = with_digest(index.entries.get(name), name, staged.digest, traits)
                new = replace(index, entries={**index.entries, name: entry})
                check_drafters(new)
                return new, entry.versions[entry.current]

            return self._place.change(named, staged)

    def rollback(self, name: str, version: int | None = None) -> Version:
        """Let `name` serve `version`, or the one before the current. Aliases to `name` follow.

        Raises AdapterNotFoundError, and InUseError where an alias drafts with `name` and that
        version has no heads.
        """

        def rolled_back(index: Index) -> tuple[Index, Version]:
            entry = index.entry(name)
            number = previous(name, entry) if version is None else version
            if number not in entry.versions:
                raise no_version(name, entry, number)
            moved = replace(entry, current=number)
            new = replace(index, entries={**index.entries, name: moved})
            check_drafters(new)
            return new, entry.versions[number]

        return self._place.change(rolled_back)

    def alias(self, alias: str, target: str, turbo: str | None = None) -> Alias:
        """Point `alias` at `NAME` (whatever it serves) or at `NAME@VERSION`, in one step.

        `turbo` names the heads that draft for it in the same way; without it, those of the target
        do, where it has any. Raises InvalidNameError, AdapterNotFoundError, NameConflictError where
        `alias` is a name, or `target` or `turbo` an alias, InvalidAdapterError where `turbo` has no
        heads, and BaseMismatchError where its heads are for another base model than the target.
        """
        check_name(alias, what="alias")

        def aliased(index: Index) -> tuple[Index, Alias]:
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
            return replace(index, aliases={**index.aliases, alias: pointer}), pointer

        return self._place.change(aliased)

    def unalias(self, alias: str) -> None:
        """Remove an alias. Raises AdapterNotFoundError."""

        def unaliased(index: Index) -> tuple[Index, None]:
            if alias not in index.aliases:
                near = did_you_mean(alias, index.aliases)
                remedy = f"{near} see `quickchange adapters list`".lstrip()
                raise AdapterNotFoundError("no such alias", key=alias, remedy=remedy)
            kept = {name: target for name, target in index.aliases.items() if name != alias}
            return replace(index, aliases=kept), None

        self._place.change(unaliased)

    def remove(self, reference: str) -> tuple[Version, ...]:
        """Remove a name or one version of it; `gc` frees the space later. Returns the versions.

        Raises InvalidNameError, AdapterNotFoundError, and InUseError where an alias points at it
        or where it is the version that the name serves while there are others.
        """
        parsed = parse_reference(reference)

        def removed(index: Index) -> tuple[Index, tuple[Version, ...]]:
            _refuse_alias(index, parsed.name)
            entry = index.entry(parsed.name)
            if parsed.selector is None:
                gone = tuple(entry.versions.values())
            else:
                gone = (index.find(parsed),)
            return without(index, entry, gone), gone

        return self._place.change(removed)

    # --- versions without a name ----------------------------------------------------------------

    def publish(self, adapter: CanonicalAdapter) -> str:
        """Publish `adapter` under no name and return its digest.

        Such a version is not listed, and `gc` removes it as unreferenced unless `keep` is called
        now and then. Raises InvalidAdapterError.
        """
        with self._place.staged(adapter, None) as staged:
            self._place.change(lambda index: (index, None), staged)
            return staged.digest

    def keep(self, digest: str) -> bool:
        """Restart a version's time until `gc` may remove it. False where the store lacks it."""
        return self._place.keep(digest)

    def discard(self, digest: str, min_age: float = 0.0) -> None:
        """Remove a version now, unless a name refers to it or it was published or kept within
        `min_age` seconds."""
        self._place.discard(digest, min_age)

    def notes(self, folder: str) -> Notes:
        """Small files that are kept beside the versions."""
        return self._place.notes(folder)

    # --- upkeep ---------------------------------------------------------------------------------

    def verify(self) -> list[Problem]:
        """Recompute every digest and check every pointer; an empty list where all is well."""
        try:
            index = self._place.index()
        except CorruptStoreError as error:
            return [Problem(error.file or self.location, str(error))]
        problems = []
        for digest in sorted(index.digests()):
            names = ", ".join(
                str(version)
                for entry in index.entries.values()
                for version in entry.versions.values()
                if digest in (version.digest, *version.needs)
            )
            try:
                self._check(digest)
            except StoreError as error:
                problems.append(Problem(names, str(error)))
        return problems

    def _check(self, digest: str) -> None:
        with self._place.original(digest) as directory:
            path = directory / ADAPTER_FILE
            check_digest(path, digest)
            AdapterInfo.read(directory / INFO_FILE)
            adapter_bytes.load(path)

    def gc(self, min_age: float = GC_MIN_AGE) -> Collected:
        """Remove versions unreferenced for `min_age` seconds, and what dead writers left.

        Safe beside writers. A reader that resolved a name before it was removed has `min_age` to
        load it.
        """
        return self._place.collect(min_age)


def _refuse_alias(index: Index, name: str) -> None:
    if name in index.aliases:
        raise NameConflictError(
            "this is an alias",
            key=name,
            remedy="use the adapter's own name, or remove the alias first",
        )
