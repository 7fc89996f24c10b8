"""Adapters by the names that calls use: folders into the store, and names into selections."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from quickchange_server.adapter_registry.composed_terms import WeightedName
from quickchange_server.adapter_registry.resolver import AUTO, OFF, Catalog, Selection
from quickchange_server.errors import (
    ConflictError,
    InvalidRequestError,
    QuickchangeError,
    UnknownModelError,
)
from quickchange_server.frontend.caller import ANYONE
from quickchange_server.protocol import LOOKUP
from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import AdapterNotFoundError, InvalidNameError
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

Span = tuple[float, int, int | None]
"""A weight for the tokens at positions [begin, end) of prompt and output; None: to the end."""
Adapter = str | Mapping[str, float | Span | Sequence[Span]] | None
"""A name, version or alias of the store; a mix Σ weight · adapter, where a weight may hold for a
span, or change from one to another; None: the base model."""
Folder = str | Path

logger = logging.getLogger(__name__)


def publish(
    store: Store, adapters: Mapping[str, Folder], base: BaseSpec, taken: Sequence[str]
) -> None:
    """Publish adapter folders under their names. A name already in the store keeps its version."""
    for name in set(taken) & set(adapters):
        raise ConflictError(
            f"adapters: {name!r} is the base model; choose another name", param="adapters"
        )
    for name, folder in adapters.items():
        if name in store.names():
            _check_same(store, name, Path(folder), base)
            continue
        for warning in add_adapter(store, name, Path(folder), base).warnings:
            logger.warning("adapters: %s: %s", name, warning)


def _check_same(store: Store, name: str, folder: Path, base: BaseSpec) -> None:
    if digest(read_adapter(folder, base).adapter) != store.resolve(name).digest:
        raise ConflictError(
            f"adapters: the store has another {name!r} than {folder}; choose another name, leave "
            "it out to use the store's, or publish this one with `quickchange adapters add`",
            param="adapters",
        )


class NamedAdapters:
    """What a store's names mean in a call."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog

    def selections(
        self, adapter: Adapter | Sequence[Adapter], turbo: str | Sequence[str], count: int
    ) -> list[Selection]:
        """The adapters and drafter of each prompt. Raises with the place of a wrong name."""
        adapters: list[Adapter] = each(adapter, count, "adapter", (str, Mapping, type(None)))
        turbos: list[str] = each(turbo, count, "turbo", (str,))
        return [
            self._selection(one, drafter, index)
            for index, (one, drafter) in enumerate(zip(adapters, turbos, strict=True))
        ]

    def _selection(self, adapter: Adapter, turbo: str, index: int) -> Selection:
        place = f"adapter[{index}]"
        mix = adapter if isinstance(adapter, Mapping) else {}
        model = adapter if isinstance(adapter, str) else self._catalog.base_name
        for name in mix or [model]:
            if mix or not self._catalog.is_base(name):
                self._check_known(name, place)
        if turbo not in (AUTO, OFF, LOOKUP):
            self._check_known(turbo, f"turbo[{index}]")
        composition = [term for name, given in mix.items() for term in _terms(name, given, place)]
        try:
            return self._catalog.select(model, composition, turbo, tenant=ANYONE.tenant)
        except QuickchangeError as error:
            raise type(error)(f"{place}: {error.message}", param=error.param) from error

    def _check_known(self, name: str, place: str) -> None:
        try:
            self._store.resolve(name)
        except (AdapterNotFoundError, InvalidNameError) as error:
            raise UnknownModelError(
                f"{place}: {error}; or give LLM its folder: adapters={{{name!r}: folder}}",
                param=place,
            ) from error


def each(value: Any, count: int, name: str, kinds: tuple[type, ...]) -> list[Any]:
    """One value of these `kinds` per prompt, from one for all or a list."""
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(one, kinds) for one in value):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InvalidRequestError(
            f"{name}: {value!r:.80} is no {wanted}, nor a list of them; give one for all prompts, "
            "or one for each",
            param=name,
        )
    if len(value) != count:
        raise InvalidRequestError(
            f"{name}: {len(value)} for {count} prompts; give one for all, or one for each",
            param=name,
        )
    return list(value)


def _terms(name: str, given: Any, place: str) -> list[WeightedName]:
    """The terms of one adapter, from a weight, a span or several."""
    if isinstance(given, list):
        return [_term(name, span, place) for span in given]
    return [_term(name, given if isinstance(given, tuple) else (given, 0, None), place)]


def _term(name: str, span: Any, place: str) -> WeightedName:
    if not isinstance(span, tuple) or len(span) != 3:
        raise InvalidRequestError(
            f"{place}: {span!r:.80} is no span of {name!r}; give (weight, begin, end)", param=place
        )
    weight, begin, end = span
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise InvalidRequestError(
            f"{place}: the weight of {name!r} is {weight!r}; give a finite number", param=place
        )
    placed = type(begin) is int and begin >= 0
    if not placed or not (end is None or (type(end) is int and end > begin)):
        raise InvalidRequestError(
            f"{place}: {name!r} can't serve from {begin!r} to {end!r}; give whole numbers from 0, "
            "the second above the first, or None for the end of the text",
            param=place,
        )
    return WeightedName(name, float(weight), begin, end)
