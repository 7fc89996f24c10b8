"""The store's index: names, their versions and aliases, as one immutable snapshot in one file.

The file is replaced whole, so a reader always has one consistent state and never takes a lock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quickchange_store.errors import (
    AdapterNotFoundError,
    AmbiguousVersionError,
    CorruptStoreError,
    InUseError,
    InvalidNameError,
    NameConflictError,
)
from quickchange_store.json_files import (
    UnreadableFileError,
    read_object,
)
from quickchange_store.names import Reference, check_name, did_you_mean, parse_reference

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import CanonicalAdapter

FORMAT = 1
TURBO_FORMAT = 2  # some version has Turbo heads, which readers of format 1 would drop
CLASSIFIER_FORMAT = 3  # some version has a classification head, which readers of 2 would drop
LATER_FORMAT = 4  # some version has what readers of 3 would drop: terms, virtual tokens, …
_FORMATS = (FORMAT, TURBO_FORMAT, CLASSIFIER_FORMAT, LATER_FORMAT)
MAX_INDEX_BYTES = 1 << 30
LAST_SECOND = 253_402_300_799.0  # of the year 9999, behind which dates can't be shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a request must know of a version, kept in the index so that no other file is read."""

    turbo: bool = False  # True: it has Turbo heads
    classifier: bool = False  # True: it has a classification head, and so generates nothing
    invoked: bool = False  # True: it serves a text from its invocation on, which its info tells
    tokenizer: bool = False  # True: it adds tokens, or brings a chat template
    virtual_tokens: int = 0  # that it puts in front of every text
    needs: tuple[str, ...] = ()  # digests of the versions that a composition is made of

    @classmethod
    def of(cls, adapter: CanonicalAdapter) -> Traits:
        """The traits of an adapter."""
        return cls(
            turbo=adapter.turbo is not None,
            classifier=adapter.classifier is not None,
            invoked=adapter.invocation is not None,
            tokenizer=adapter.tokenizer is not None,
            virtual_tokens=adapter.virtual_tokens,
            needs=adapter.needs,
        )


_TRAITS = tuple(trait.name for trait in fields(Traits))


@dataclass(frozen=True, slots=True)
class Version(Traits):
    """One published version of a name."""

    name: str
    number: int  # from 1, in the order of publishing; a number is not used twice
    digest: str  # 64 hexadecimal digits
    created: float  # seconds since 1970

    @property
    def served(self) -> tuple[str, ...]:
        """Digests of what is on the device for it: its terms, or itself."""
        return self.needs or (self.digest,)

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class NameEntry:
    """A name: its versions by number, and the one that the bare name serves."""

    versions: Mapping[int, Version]
    current: int
    next_number: int


@dataclass(frozen=True, slots=True)
class Alias:
    """A pointer to a name, or to one version of it, and the Turbo heads that draft for it."""

    name: str
    number: int | None = None  # None: whatever the name serves
    turbo: str | None = None  # NAME or NAME@NUMBER, whose heads draft in place of its own

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Index:
    """Names and aliases with the versions that they point at."""

    entries: Mapping[str, NameEntry] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)

    def entry(self, name: str) -> NameEntry:
        """The entry of `name`. Raises AdapterNotFoundError."""
        try:
            return self.entries[name]
        except KeyError:
            known = (*self.entries, *self.aliases)
            otherwise = "add it with `quickchange adapters add`, or"
            remedy = f"{did_you_mean(name, known, otherwise)} see `quickchange adapters list`"
            raise AdapterNotFoundError(
                "no adapter has this name", key=name, remedy=remedy
            ) from None

    def find(self, reference: Reference) -> Version:
        """The version that a reference means. Raises AdapterNotFoundError."""
        alias = self.aliases.get(reference.name)
        if alias is not None:
            return self._aliased(alias, reference)
        entry = self.entry(reference.name)
        if reference.selector is None:
            return entry.versions[entry.current]
        return _select(entry, reference)

    def _aliased(self, alias: Alias, reference: Reference) -> Version:
        if reference.selector is not None:
            raise AdapterNotFoundError(
                f"{reference.name!r} is an alias of {alias} and has no versions of its own",
                key=str(reference),
                remedy=f"ask for {alias.name}@{reference.selector}",
            )
        entry = self.entry(alias.name)
        return entry.versions[entry.current if alias.number is None else alias.number]

    def drafting(self, reference: Reference) -> Version | None:
        """The version whose heads draft for a reference: its alias's Turbo, else its own heads."""
        alias = self.aliases.get(reference.name)
        if alias is not None and alias.turbo is not None:
            return self.find(parse_reference(alias.turbo))
        version = self.find(reference)
        return version if version.turbo else None

    def digests(self) -> set[str]:
        """Digests that a name refers to, by itself or as a term of a composition."""
        versions = (v for entry in self.entries.values() for v in entry.versions.values())
        return {digest for version in versions for digest in (version.digest, *version.needs)}


def _select(entry: NameEntry, reference: Reference) -> Version:
    if reference.number is not None and reference.number in entry.versions:
        return entry.versions[reference.number]
    prefix = reference.digest_prefix
    fitting = [v for v in entry.versions.values() if prefix and v.digest.startswith(prefix)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise AmbiguousVersionError(
            "several versions begin with this digest: " + ", ".join(v.digest for v in fitting),
            key=str(reference),
            remedy="give more digits, or the version's number",
        )
    numbers = ", ".join(str(number) for number in sorted(entry.versions))
    raise AdapterNotFoundError(
        "the adapter has no such version",
        key=str(reference),
        remedy=f"its versions are {numbers}",
    )


# --- changes: each gives a new value ------------------------------------------------------------


def with_digest(entry: NameEntry | None, name: str, digest: str, traits: Traits) -> NameEntry:
    """The entry with `digest` current: an old version of it, or a new one, with its traits."""
    versions: Mapping[int, Version] = {} if entry is None else entry.versions
    number = 1 if entry is None else entry.next_number
    for version in versions.values():
        if entry is not None and version.digest == digest:
            return replace(entry, current=version.number)
    added = Version(name, number, digest, time.time(), **asdict(traits))
    return NameEntry({**versions, number: added}, current=number, next_number=number + 1)


def previous(name: str, entry: NameEntry) -> int:
    """The number of the version before the current one. Raises AdapterNotFoundError."""
    earlier = [number for number in entry.versions if number < entry.current]
    if not earlier:
        raise AdapterNotFoundError(
            f"there is no version before {entry.current}",
            key=name,
            remedy="name the version to serve: it has "
            + ", ".join(str(number) for number in sorted(entry.versions)),
        )
    return max(earlier)


def no_version(name: str, entry: NameEntry, number: int) -> AdapterNotFoundError:
    """An error that lists the versions of `name`."""
    numbers = ", ".join(str(known) for known in sorted(entry.versions))
    return AdapterNotFoundError(
        "the adapter has no such version", key=f"{name}@{number}", remedy=f"it has {numbers}"
    )


def without(index: Index, entry: NameEntry, gone: tuple[Version, ...]) -> Index:
    """The index without the versions `gone` of `entry`. Raises InUseError."""
    name = gone[0].name
    numbers = {version.number for version in gone}
    left = {n: v for n, v in entry.versions.items() if n not in numbers}
    for alias, target in index.aliases.items():
        if target.name == name and (target.number in numbers or not left):
            raise InUseError(
                f"the alias {alias!r} points at it",
                key=str(target),
                remedy=f"remove or repoint the alias {alias!r} first",
            )
        drafter = None if target.turbo is None else parse_reference(target.turbo)
        if drafter and drafter.name == name and (drafter.number in numbers or not left):
            raise InUseError(
                f"the alias {alias!r} drafts with it",
                key=str(drafter),
                remedy=f"remove the alias {alias!r} or give it another Turbo first",
            )
    if left and entry.current in numbers:
        raise InUseError(
            f"it is the version that {name} serves",
            key=f"{name}@{entry.current}",
            remedy=f"roll back {name} first, or remove {name} as a whole",
        )
    kept = {other: e for other, e in index.entries.items() if other != name}
    if left:
        kept[name] = replace(entry, versions=left)
    return replace(index, entries=kept)


def pointed(index: Index, reference: str) -> tuple[Version, int | None]:
    """The version that an alias's pointer means now, and its number where the pointer is pinned.

    Raises InvalidNameError, AdapterNotFoundError, NameConflictError (it is an alias itself).
    """
    parsed = parse_reference(reference)
    if parsed.name in index.aliases:
        raise NameConflictError(
            "an alias can't point at an alias",
            key=reference,
            remedy=f"point it at {index.aliases[parsed.name]}",
        )
    version = index.find(parsed)
    return version, None if parsed.selector is None else version.number


def check_drafters(index: Index) -> None:
    """Raise InUseError where an alias's Turbo serves a version without heads."""
    for alias, target in index.aliases.items():
        if target.turbo is None:
            continue
        version = index.find(parse_reference(target.turbo))
        if not version.turbo:
            raise InUseError(
                f"the alias {alias!r} drafts with {target.turbo}, and this version has no heads",
                key=str(version),
                remedy=f"publish it under another name, or give the alias {alias!r} another Turbo",
            )


# --- as a file ----------------------------------------------------------------------------------


def encode(index: Index) -> bytes:
    """The index as JSON bytes."""
    names = {
        name: {
            "current": entry.current,
            "next": entry.next_number,
            "versions": {
                str(v.number): {
                    "digest": v.digest,
                    "created": v.created,
                    **{trait: value for trait in _TRAITS if (value := getattr(v, trait))},
                }
                for v in entry.versions.values()
            },
        }
        for name, entry in index.entries.items()
    }
    aliases = {
        alias: {
            "name": target.name,
            "version": target.number,
            **({} if target.turbo is None else {"turbo": target.turbo}),
        }
        for alias, target in index.aliases.items()
    }
    every = [v for entry in index.entries.values() for v in entry.versions.values()]
    number = TURBO_FORMAT if any(v.turbo for v in every) else FORMAT
    number = CLASSIFIER_FORMAT if any(v.classifier for v in every) else number
    later = any(v.invoked or v.tokenizer or v.virtual_tokens or v.needs for v in every)
    number = LATER_FORMAT if later else number
    content = {"format": number, "names": names, "aliases": aliases}
    return json.dumps(content, sort_keys=True).encode()


def decode(content: bytes, path: Path | str) -> Index:
    """The index from its JSON; `path` is for messages. Raises CorruptStoreError."""
    try:
        tree = read_object(content)
        if tree.get("format") not in _FORMATS:
            raise CorruptStoreError(
                f"format {tree.get('format')!r} is not known to this version, which reads up to "
                f"{_FORMATS[-1]}",
                file=str(path),
                key="format",
                remedy="use the version of quickchange that wrote it",
            )
        stored = _StoredIndex.model_validate(tree)
        entries = {name: _entry(name, entry) for name, entry in stored.names.items()}
        aliases = {
            check_name(alias, what="alias"): Alias(check_name(to.name), to.version, to.turbo)
            for alias, to in stored.aliases.items()
        }
        _check_pointers(entries, aliases)
    except UnreadableFileError as error:
        raise damaged(path, error.problem, error.key) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise damaged(path, first["msg"], ".".join(map(str, first["loc"]))) from error
    except (ValueError, InvalidNameError) as error:
        raise damaged(path, str(error)) from error
    return Index(entries, aliases)


def damaged(path: Path | str, problem: str, key: str | None = None) -> CorruptStoreError:
    """The error for an index that can't be used."""
    return CorruptStoreError(
        f"the index is damaged ({problem})",
        file=str(path),
        key=key,
        remedy="restore it from a backup; the versions beside it are untouched",
    )


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StoredVersion(_Stored):
    digest: _Digest
    created: Annotated[float, Field(ge=0, le=LAST_SECOND)]
    turbo: bool = False
    classifier: bool = False
    invoked: bool = False
    tokenizer: bool = False
    virtual_tokens: Annotated[int, Field(ge=0)] = 0
    needs: list[_Digest] = []

    def version(self, name: str, number: int) -> Version:
        """The version of that number."""
        traits = {trait: getattr(self, trait) for trait in _TRAITS} | {"needs": tuple(self.needs)}
        return Version(name, number, self.digest, self.created, **traits)


class _StoredName(_Stored):
    current: int
    next: int
    versions: Annotated[dict[str, _StoredVersion], Field(min_length=1)]


class _StoredAlias(_Stored):
    name: str
    version: int | None
    turbo: str | None = None


class _StoredIndex(_Stored):
    names: dict[str, _StoredName]
    aliases: dict[str, _StoredAlias]


def _entry(name: str, stored: _StoredName) -> NameEntry:
    check_name(name)
    versions = {}
    for text, version in stored.versions.items():
        number = Reference(name, text).number
        if number is None:
            raise ValueError(f"{name} has a version {text!r}, which is no number from 1")
        versions[number] = version.version(name, number)
    if stored.next <= max(versions):
        raise ValueError(f"{name} has the version {max(versions)}, and the next is {stored.next}")
    return NameEntry(versions, stored.current, stored.next)


def _check_pointers(entries: Mapping[str, NameEntry], aliases: Mapping[str, Alias]) -> None:
    for name, entry in entries.items():
        if entry.current not in entry.versions:
            raise ValueError(f"{name} serves version {entry.current}, which it lacks")
    for alias, target in aliases.items():
        if alias in entries:
            raise ValueError(f"{alias} is a name and an alias")
        if target.name not in entries:
            raise ValueError(f"alias {alias} points at {target.name}, which is missing")
        if target.number is not None and target.number not in entries[target.name].versions:
            raise ValueError(f"alias {alias} points at {target}, which is missing")
        if target.turbo is not None:
            _check_turbo(entries, alias, parse_reference(target.turbo))


def _check_turbo(entries: Mapping[str, NameEntry], alias: str, reference: Reference) -> None:
    entry = entries.get(reference.name)
    number = reference.number or (entry and entry.current)
    if entry is None or number not in entry.versions:
        raise ValueError(f"alias {alias} drafts with {reference}, which is missing")
