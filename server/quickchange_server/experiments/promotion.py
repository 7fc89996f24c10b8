"""Promotion of a variant, which moves the experiment's alias to it, and its rollback.

The alias's earlier target is on the disk before the alias moves, so a crash in between loses
nothing that rollback needs. Both can be repeated, after a crash or a lost answer: a repeated
promotion completes the move and records nothing twice, so that one rollback undoes it. It may come
to another replica than the first, so both begin with the experiment as the database has it. HTTP is
not known here.
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

NOT_NAMES = ("auto", "off", "lookup")  # values of `turbo` that name no adapter


@dataclass(frozen=True, slots=True)
class Moved:
    """A moved alias. `not_carried`: fields of the variant that an alias can't express."""

    alias: str
    before: Pointed | None
    after: Pointed | None
    not_carried: tuple[str, ...] = ()


class Promotions:
    """Promotes and rolls back, one at a time."""

    def __init__(self, store: Store, experiments: Experiments) -> None:
        self._store = store
        self._experiments = experiments
        self._turn = asyncio.Lock()

    async def promote(self, name: str, caller: Caller, variant: str) -> Moved:
        """Point the experiment's alias at the adapter of `variant`.

        Raises UnknownModelError, InvalidRequestError if there is no alias or the variant is not
        a single adapter, ConflictError if the experiment changes meanwhile, UnavailableError,
        StoreError and OSError; then nothing has changed.
        """
        async with self._turn:
            experiment = await self._experiments.latest(name)
            alias = _alias_of(experiment)
            variant_of(experiment.definition, variant, param="variant")
            served = experiment.definition.variant(variant)
            index = self._store.snapshot()
            target, before = _target(served, index), _pointed(index.aliases.get(alias))
            if _is_again(experiment, variant, alias, before, target):
                await self._move(alias, target)
                return Moved(alias, before, target, _not_carried(served))
            await self._experiments.promote(name, caller, variant, before, experiment.version)
            try:
                await self._move(alias, target)
            except (StoreError, OSError):
                await self._experiments.roll_back(name, caller)
                raise
            return Moved(alias, before, target, _not_carried(served))

    async def roll_back(self, name: str, caller: Caller) -> Moved:
        """Restore the alias's target before the last promotion. Raises UnknownModelError,
        ConflictError if there was none, UnavailableError, StoreError."""
        async with self._turn:
            experiment = await self._experiments.latest(name)
            rolled_back(experiment)  # raises if there is nothing to undo
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
    """The alias target that serves the same as the variant. Raises InvalidRequestError."""
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
    """True if the last promotion is this one, completed or not."""
    if not experiment.promotions:
        return False
    last = experiment.promotions[-1]
    return (last.variant, last.alias) == (variant, alias) and now in (target, last.before)


def _pointed(alias: Alias | None) -> Pointed | None:
    return None if alias is None else Pointed(str(alias), alias.turbo)


def _not_carried(variant: Variant) -> tuple[str, ...]:
    overrides = ("overrides",) if variant.overrides else ()
    return (*overrides, *(("turbo",) if variant.turbo in NOT_NAMES else ()))
