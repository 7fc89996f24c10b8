"""Variants that an evaluation compares: an adapter, from the store or a folder, and its drafter.

A variant is written `NAME[+TURBO]`. NAME is a request's `model` (a name, a name with a version, an
alias), a folder, or base; TURBO is a request's `turbo` (auto, off, lookup, a name), or a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quickchange_server.protocol import Component, Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest as digest_of
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.errors import AdapterNotFoundError, InvalidAdapterError
from quickchange_store.importing import read_adapter
from quickchange_store.store import Store

BASE = "base"
_AUTO, _OFF, _LOOKUP = "auto", "off", "lookup"


@dataclass(frozen=True, slots=True)
class EvaluatedVariant:
    """One row of the table."""

    label: str
    adapter: str | None  # digest of the adapter that answers; None: the base alone
    drafting: Drafting | None
    virtual_tokens: int = 0  # that the adapter puts in front of a text

    @property
    def components(self) -> tuple[Component, ...]:
        if self.adapter is None:
            return ()
        return (Component(self.adapter, virtual_tokens=self.virtual_tokens),)


@dataclass(frozen=True, slots=True)
class _Found:
    """Result of looking up a name or a folder."""

    adapter: str | None
    turbo: str | None  # digest of the heads that `auto` means


class EvaluatedAdapters:
    """Adapters by name in a store, where there is one, or by folder; kept once read."""

    def __init__(self, model: str, store: Store | None) -> None:
        self._model = model
        self._store = store
        self._read: dict[str, CanonicalAdapter] = {}  # by digest

    @cached_property
    def _spec(self) -> BaseSpec:
        return base_spec(self._model)

    def load(self, digest: str) -> CanonicalAdapter:
        """The adapter of a digest that `variant` gave."""
        return self._read[digest]

    def variant(self, text: str) -> EvaluatedVariant:
        """The variant that `NAME[+TURBO]` means. Raises StoreError, naming NAME or TURBO."""
        name, turbo = _split(text)
        found = self._find(name)
        drafting = self._drafting(found, turbo)
        virtual = 0 if found.adapter is None else self._read[found.adapter].virtual_tokens
        return EvaluatedVariant(_label(name, turbo), found.adapter, drafting, virtual)

    def _drafting(self, found: _Found, turbo: str) -> Drafting | None:
        if turbo == _OFF:
            return None
        if turbo == _LOOKUP:
            return Drafting(lookup=True)
        if turbo == _AUTO:
            return None if found.turbo is None else Drafting(found.turbo, lookup=True)
        heads = self._find(turbo).turbo
        if heads is None:
            raise InvalidAdapterError(
                "it has no Turbo heads",
                key=turbo,
                remedy=f"after +, give {_AUTO}, {_OFF}, {_LOOKUP} or an adapter that has heads",
            )
        return Drafting(heads, lookup=True)

    def _find(self, name: str) -> _Found:
        if _is_folder(name):
            return self._by_folder(Path(name))
        if name == BASE:
            return _Found(None, None)
        if self._store is None:
            raise AdapterNotFoundError(
                f"{name!r} is not a folder", remedy="give --store for adapters by name"
            )
        resolved = self._store.resolve(name)
        if resolved.turbo is not None:
            self._read[resolved.turbo] = self._store.load(resolved.turbo)
        return self._keep(resolved.digest, self._store.load(resolved.digest), resolved.turbo)

    def _by_folder(self, folder: Path) -> _Found:
        adapter = read_adapter(folder, self._spec).adapter
        digest = digest_of(adapter)
        return self._keep(digest, adapter, None if adapter.turbo is None else digest)

    def _keep(self, digest: str, adapter: CanonicalAdapter, turbo: str | None) -> _Found:
        self._read[digest] = adapter
        return _Found(digest if adapter.updates or adapter.prompt else None, turbo)


def _split(text: str) -> tuple[str, str]:
    """Split into NAME and TURBO. A folder whose name contains a + stays whole."""
    name, plus, turbo = text.rpartition("+")
    if not plus or _is_folder(text):
        return text, _AUTO
    return name, turbo


def _is_folder(text: str) -> bool:
    return bool(text) and Path(text).is_dir()


def _label(name: str, turbo: str) -> str:
    shown, drafts = (Path(t).resolve().name if _is_folder(t) else t for t in (name, turbo))
    return shown if turbo == _AUTO else f"{shown}+{drafts}"
