"""Names to content: which base and which adapter versions a request's `model` means.

A name is resolved once, when its request arrives: the request keeps the digests that it began
with, whatever happens to the name meanwhile. Knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quickchange_server.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from quickchange_server.messages import Component
from quickchange_server.settings import Settings
from quickchange_store.errors import StoreError
from quickchange_store.store import Store

MAX_COMPONENTS = 32  # of one composition
BASE_LABEL = "base"  # both are reserved or impossible as adapter names
COMPOSITION_LABEL = "+"


@dataclass(frozen=True, slots=True)
class WeightedName:
    """One entry of a request's `adapters`."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request is served by."""

    model: str  # as the client named it
    adapters: tuple[Component, ...]  # sorted by digest; empty: the plain base
    label: str  # for metrics: the adapter's name without version, or one of the two above


def base_names(settings: Settings) -> tuple[str, ...]:
    """The names that mean the base model; the first is the one that it is listed under."""
    if settings.served_model_name is not None:
        return (settings.served_model_name,)
    folder = Path(settings.model)
    return (folder.resolve().name,) if folder.is_dir() else (settings.model,)


class Catalog:
    """Resolves what requests name."""

    def __init__(self, store: Store, names: tuple[str, ...], *, adapters: bool = True) -> None:
        self._store = store
        self._adapters = adapters
        self.base_names = names

    @property
    def base_name(self) -> str:
        return self.base_names[0]

    def is_base(self, name: str) -> bool:
        return name in self.base_names

    def select(self, model: str, composition: Sequence[WeightedName] | None = None) -> Selection:
        """What `model` (or the base with a composition Σ weightᵢ · adapterᵢ) stands for.

        Raises UnknownModelError, InvalidRequestError, or ForbiddenError where adapters are off.
        """
        if composition:
            return self._composed(model, composition)
        if self.is_base(model):
            return Selection(model, (), BASE_LABEL)
        name, digest = self._resolve(model, param="model")
        return Selection(model, (Component(digest),), name)

    def _composed(self, model: str, composition: Sequence[WeightedName]) -> Selection:
        if not self.is_base(model):
            raise InvalidRequestError(
                f"adapters: a composition is over the base model, and model names {model!r}; "
                f"set model to {self.base_name!r} and list {model!r} among the adapters",
                param="adapters",
            )
        if len(composition) > MAX_COMPONENTS:
            raise InvalidRequestError(
                f"adapters: at most {MAX_COMPONENTS} adapters in one composition, "
                f"not {len(composition)}",
                param="adapters",
            )
        weights: dict[str, float] = {}
        names: set[str] = set()
        for index, entry in enumerate(composition):
            name, digest = self._resolve(entry.name, param=f"adapters[{index}].id")
            weights[digest] = weights.get(digest, 0.0) + entry.weight
            names.add(name)
        components = _components(weights)
        label = names.pop() if len(names) == 1 else COMPOSITION_LABEL
        return Selection(model, components, label if components else BASE_LABEL)

    def _resolve(self, reference: str, *, param: str) -> tuple[str, str]:
        """Name without version, and digest."""
        if not self._adapters:
            raise ForbiddenError(
                f"{param}: {reference!r} is not the base model ({self.base_name!r}), and adapters "
                "are switched off by the setting adapters (QUICKCHANGE_ADAPTERS)",
                param=param,
            )
        try:
            resolved = self._store.resolve(reference)
        except StoreError as error:
            raise UnknownModelError(
                f"{param}: the model {reference!r} does not exist: {error} "
                "GET /v1/models lists what there is",
                param=param,
            ) from error
        return resolved.name, resolved.digest


def _components(weights: dict[str, float]) -> tuple[Component, ...]:
    """In one order whatever the request's, so that equal compositions share cached prefixes."""
    for weight in weights.values():
        if not math.isfinite(weight):
            raise InvalidRequestError(
                "adapters: the weights of one adapter add up to infinity; give smaller weights",
                param="adapters",
            )
    return tuple(
        Component(digest, weight) for digest, weight in sorted(weights.items()) if weight != 0.0
    )
