"""Gives an experiment's alias to a variant, and takes it back. Knows nothing of HTTP.

What the alias was is on the disk before it moves, so a crash between the two loses nothing that
rollback needs. Both may be sent again, after a crash or where no answer came: promoting what is
promoted already finishes the move and notes nothing twice, so that one rollback undoes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from quickchange_server.errors import InvalidRequestError
from quickchange_server.experiments.definition import Variant
from quickchange_server.experiments.experiment import Experiment, Pointed, rolled_back, variant_of
from quickchange_server.experiments.registry import Experiments
from quickchange_server.frontend.caller import Caller
from quickchange_store.errors import StoreError
from quickchange_store.index import Alias, Index
from quickchange_store.store import Store

NOT_NAMES = ("auto", "off", "lookup")  # of `turbo`


@dataclass(frozen=True, slots=True)
class Moved:
    """An alias, what it was, what it is, and what of the variant an alias can't carry."""

    alias: str
    before: Pointed | None
    after: Pointed | None
    not_carried: tuple[str, ...] = ()


class Promotions:
    """One move at a time."""

    def __init__(self, store: Store, experiments: Experiments) -> None:
        self._store = store
        self._experiments = experiments
        self._turn = asyncio.Lock()

    async def promote(self, name: str, caller: Caller, variant: str) -> Moved:
        """Point the experiment's alias at what `variant` serves.

        Raises UnknownModelError, InvalidRequestError where there is no alias or the variant is
        not one adapter, StoreError and OSError; then nothing has changed.
        """
        async with self._turn:
            experiment = self._experiments.get(name)
            alias = _alias_of(experiment)
            variant_of(experiment.definition, variant, param="variant")
            served = experiment.definition.variant(variant)
            index = self._store.snapshot()
            target, before = _target(served, index), _pointed(index.aliases.get(alias))
            if _is_again(experiment, variant, alias, before, target):
                await self._move(alias, target)
                return Moved(alias, before, target, _not_carried(served))
            await self._experiments.promote(name, caller, variant, before)
            try:
                await self._move(alias, target)
            except (StoreError, OSError):
                await self._experiments.roll_back(name, caller)
                raise
            return Moved(alias, before, target, _not_carried(served))

    async def roll_back(self, name: str, caller: Caller) -> Moved:
        """Restore what the alias was before the last promotion. Raises UnknownModelError,
        ConflictError where there was none, StoreError."""
        async with self._turn:
            experiment = self._experiments.get(name)
            rolled_back(experiment)  # refuses where there is nothing to undo
            last = experiment.promotions[-1]
            now = _pointed(self._store.snapshot().aliases.get(last.alias))
            await self._move(last.alias, last.before)
            await self._experiments.roll_back(name, caller)
            return Moved(last.alias, now, last.before)

    async def _move(self, alias: str, target: Pointed | None) -> None:
        if target is not None:
            await asyncio.to_thread(self._store.alias, alias, target.target, target.turbo)
        elif alias in self._store.snapshot().aliases:
            await asyncio.to_thread(self._store.unalias, alias)


def _alias_of(experiment: Experiment) -> str:
    alias = experiment.definition.alias
    if alias is None:
        raise InvalidRequestError(
            f"alias: the experiment {experiment.name!r} names no alias to move; PATCH its field "
            "alias",
            param="alias",
        )
    return alias


def _target(variant: Variant, index: Index) -> Pointed:
    """What an alias has to point at to serve as the variant does. Raises InvalidRequestError."""
    model = variant.model
    alias = None if model is None else index.aliases.get(model)
    turbo = None if variant.turbo in NOT_NAMES else variant.turbo
    if alias is not None:
        return Pointed(str(alias), turbo or alias.turbo)
    if model is None or model.partition("@")[0] not in index.entries:
        raise InvalidRequestError(
            f"variant: {variant.name!r} is not one adapter, and an alias can only point at one",
            param="variant",
        )
    return Pointed(model, turbo)


def _is_again(
    experiment: Experiment, variant: str, alias: str, now: Pointed | None, target: Pointed
) -> bool:
    """Whether the last promotion is this one, made or begun."""
    if not experiment.promotions:
        return False
    last = experiment.promotions[-1]
    return (last.variant, last.alias) == (variant, alias) and now in (target, last.before)


def _pointed(alias: Alias | None) -> Pointed | None:
    return None if alias is None else Pointed(str(alias), alias.turbo)


def _not_carried(variant: Variant) -> tuple[str, ...]:
    overrides = ("overrides",) if variant.overrides else ()
    return (*overrides, *(("turbo",) if variant.turbo in NOT_NAMES else ()))
