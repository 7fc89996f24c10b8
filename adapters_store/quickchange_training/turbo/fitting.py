"""Fitting of heads to an adapter of a store: which adapter, and which heads they go on from.

Sequential heads go on to any depth: a head starts from what the head before ended with, so that the
last head's blocks may be used again. The draft vocabulary is not theirs, but the training's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_training.errors import RecipeError

if TYPE_CHECKING:
    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
    from quickchange_store.canonical.turbo_part import TurboHeads
    from quickchange_store.store import Store
    from quickchange_training.turbo.turbo_recipe import TurboRecipe


@dataclass(frozen=True)
class StartingHeads:
    """Heads to go on from, and what the report calls them."""

    name: str
    heads: TurboHeads


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter of a store that heads are fitted to."""

    name: str  # its own, where an alias was given
    digest: str
    adapter: CanonicalAdapter  # without heads
    drafting: StartingHeads | None  # the heads that draft for the name until now


def fitted_adapter(store: Store, reference: str, spec: BaseSpec) -> FittedAdapter:
    """The adapter that `reference`, a name, version or alias, stands for now.

    Raises StoreError, and RecipeError for one of another base and for heads alone.
    """
    resolved = store.resolve(reference)
    adapter = store.load(resolved.digest)
    if adapter.architecture != spec.architecture:
        raise RecipeError(
            f"--on {reference}: it is for {adapter.architecture}, and --model is "
            f"{spec.architecture}; give the model that it was trained on"
        )
    if not adapter.updates and not adapter.virtual_tokens:
        raise RecipeError(
            f"--on {reference}: it holds heads alone; name the adapter that they are to draft for, "
            "and these heads with --from"
        )
    drafting = None
    if resolved.turbo is not None:
        heads = adapter.turbo if resolved.turbo == resolved.digest else None
        heads = heads or store.load(resolved.turbo).turbo
        assert heads is not None  # the index says that the version has heads
        drafting = StartingHeads(f"those of {reference}", heads)
    return FittedAdapter(resolved.name, resolved.digest, replace(adapter, turbo=None), drafting)


def starting_heads(given: str, store: Store | None, spec: BaseSpec) -> StartingHeads:
    """The heads `given` with --from: a folder, or a name in the store.

    Raises StoreError, and RecipeError where there are none.
    """
    from quickchange_store.importing import read_adapter

    folder = Path(given)
    if folder.is_dir():
        heads = read_adapter(folder, spec).adapter.turbo
    elif store is None:
        raise RecipeError(f"--from {given}: no such folder; a name needs --store")
    else:
        drafter = store.resolve(given).turbo
        heads = None if drafter is None else store.load(drafter).turbo
    if heads is None:
        raise RecipeError(f"--from {given}: it has no Turbo heads")
    return StartingHeads(given, heads)


def checked_start(start: StartingHeads, recipe: TurboRecipe, hidden: int) -> TurboHeads:
    """The heads to train, `recipe.depth` deep. Raises RecipeError where they can't go on."""
    heads, default = start.heads, type(recipe)()
    for option in ("kind", "share", "blocks"):
        if getattr(recipe, option) != getattr(default, option):
            raise RecipeError(f"--{option}: heads that go on keep their form; leave it out")
    if heads.outputs:
        raise RecipeError(
            f"--from {start.name}: its heads have LM heads of their own, and training keeps the "
            "base's; go on from others"
        )
    if heads.hidden != hidden:
        raise RecipeError(
            f"--from {start.name}: its heads have a hidden size of {heads.hidden}, and the base "
            f"has {hidden}; go on from heads of the same base"
        )
    more = recipe.depth - heads.depth
    if more > 0 and not heads.sequential:
        raise RecipeError(
            f"--depth {recipe.depth}: parallel heads draft no deeper than they were trained; give "
            f"--depth {heads.depth}"
        )
    deep = (*heads.heads, *[heads.heads[-1]] * more)[: recipe.depth]
    used = sorted({index for head in deep for index in head})
    return replace(
        heads,
        blocks=tuple(heads.blocks[index] for index in used),
        heads=tuple(tuple(used.index(index) for index in head) for head in deep),
    )
