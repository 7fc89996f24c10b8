"""Variants that an evaluation compares: an adapter and its drafter, or several adapters at once.

A variant is written

    NAME[+TURBO]               NAME is a request's `model` (a name, a name with a version, an
                               alias), a folder, or base; TURBO is a request's `turbo` (auto, off,
                               lookup, a name), or a folder
    NAME*WEIGHT,NAME*WEIGHT    the exact weighted sum, as a request's `adapters` have it
    STRATEGY(NAME*WEIGHT,…)    LoRAs merged into one: ties, dare_linear or dare_ties
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

from quickchange_server.frontend.adapter_spans import Invocations, activated, summed
from quickchange_server.protocol import Component, Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest as digest_of
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.canonical.composition_part import Term
from quickchange_store.combining.merging import MergeStrategy, Recipe, merge
from quickchange_store.errors import AdapterNotFoundError, InvalidAdapterError
from quickchange_store.importing import read_adapter
from quickchange_store.store import Store

BASE = "base"
_AUTO, _OFF, _LOOKUP = "auto", "off", "lookup"
_MERGED = re.compile(rf"({'|'.join(get_args(MergeStrategy))})\((.+)\)")


@dataclass(frozen=True, slots=True)
class EvaluatedVariant:
    """One row of the table."""

    label: str
    components: tuple[Component, ...]  # the adapters that answer; none: the base alone
    drafting: Drafting | None
    invocations: Invocations  # of activated adapters among them

    def serving(self, prompt: Sequence[int]) -> tuple[Component, ...]:
        """The terms that serve a prompt: an activated adapter begins at its invocation."""
        return activated(self.components, self.invocations, prompt)


@dataclass(frozen=True, slots=True)
class _Found:
    """Result of looking up a name or a folder."""

    components: tuple[Component, ...]  # none: it adds nothing to the model
    turbo: str | None  # digest of the heads that `auto` means


class EvaluatedAdapters:
    """Adapters by name in a store, where there is one, or by folder; kept once read.

    density: share of the values that a merge keeps.
    """

    def __init__(self, model: str, store: Store | None, density: float = 0.5) -> None:
        self._model = model
        self._store = store
        self._density = density
        self._read: dict[str, CanonicalAdapter] = {}  # by digest

    @cached_property
    def _spec(self) -> BaseSpec:
        return base_spec(self._model)

    def load(self, digest: str) -> CanonicalAdapter:
        """The adapter of a digest that `variant` gave."""
        return self._read[digest]

    def variant(self, text: str) -> EvaluatedVariant:
        """The variant that `text` means. Raises StoreError, naming the part that is wrong."""
        if not _is_folder(text):
            merged = _MERGED.fullmatch(text)
            if merged is not None:
                return self._merged(cast(MergeStrategy, merged[1]), merged[2])
            if "*" in text:
                return self._variant(*self._weighted(text), None)
        name, turbo = _split(text)
        found = self._find(name)
        return self._variant(_label(name, turbo), found.components, self._drafting(found, turbo))

    def _variant(
        self, label: str, components: tuple[Component, ...], drafting: Drafting | None
    ) -> EvaluatedVariant:
        read = {component.digest: self._read[component.digest] for component in components}
        invocations = {
            digest: adapter.invocation.tokens
            for digest, adapter in read.items()
            if adapter.invocation is not None
        }
        return EvaluatedVariant(label, components, drafting, invocations)

    def _component(self, term: Term) -> Component:
        """A term of an adapter that has been read."""
        virtual_tokens = self._read[term.digest].virtual_tokens
        return Component(term.digest, term.weight, term.begin, term.end, virtual_tokens)

    def _sum(self, terms: Sequence[Component]) -> tuple[Component, ...]:
        """The terms in one form for equal sums, with the virtual tokens that adapters have."""
        return tuple(
            self._component(Term(t.digest, t.weight, t.begin, t.end)) for t in summed(terms)
        )

    def _merged(self, strategy: MergeStrategy, text: str) -> EvaluatedVariant:
        label, components = self._weighted(text)
        weights = tuple((component.digest, component.weight) for component in components)
        recipe = Recipe(strategy, weights, self._density)
        adapter = merge(recipe, [self._read[digest] for digest, _ in recipe.components])
        digest = digest_of(adapter)
        self._read[digest] = adapter
        return self._variant(f"{strategy}({label})", (self._component(Term(digest)),), None)

    def _weighted(self, text: str) -> tuple[str, tuple[Component, ...]]:
        """Label and sum of `NAME*WEIGHT,NAME*WEIGHT`."""
        labels: list[str] = []
        terms: list[Component] = []
        for part in text.split(","):
            name, _, number = part.strip().rpartition("*")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name or not math.isfinite(weight):
                raise InvalidAdapterError(
                    f"{part.strip()!r} is no adapter with a weight",
                    key=text,
                    remedy="write NAME*WEIGHT,NAME*WEIGHT, as in sql*0.5,orders*0.5",
                )
            found = self._find(name)
            if not found.components:
                raise InvalidAdapterError(
                    "it adds nothing that could be weighed",
                    key=name,
                    remedy="name adapters with updates",
                )
            labels.append(f"{_label(name, _AUTO)}*{weight:g}")
            terms += [replace(term, weight=term.weight * weight) for term in found.components]
        return ",".join(labels), self._sum(terms)

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
            return _Found((), None)
        if self._store is None:
            raise AdapterNotFoundError(
                f"{name!r} is not a folder", remedy="give --store for adapters by name"
            )
        resolved = self._store.resolve(name)
        if resolved.turbo is not None:
            self._read[resolved.turbo] = self._store.load(resolved.turbo)
        adapter = self._store.load(resolved.digest)
        if adapter.composition is None:
            return self._keep(resolved.digest, adapter, resolved.turbo)
        for term in adapter.composition.terms:
            self._read[term.digest] = self._store.load(term.digest)
        terms = [self._component(term) for term in adapter.composition.terms]
        return _Found(self._sum(terms), resolved.turbo)

    def _by_folder(self, folder: Path) -> _Found:
        adapter = read_adapter(folder, self._spec).adapter
        digest = digest_of(adapter)
        return self._keep(digest, adapter, None if adapter.turbo is None else digest)

    def _keep(self, digest: str, adapter: CanonicalAdapter, turbo: str | None) -> _Found:
        self._read[digest] = adapter
        adds = bool(adapter.updates) or adapter.prompt is not None
        return _Found((self._component(Term(digest)),) if adds else (), turbo)


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
