"""What of the store's names exists for a caller: a name that isn't seen is as one that isn't there.

An alias is seen where its own name and every name that it points at are, since what it means tells
of these. Knows nothing of keys or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quickchange_store.index import Alias, Index
from quickchange_store.names import Reference, parse_reference

Sees = Callable[[str], bool]  # whether a name without version exists for the caller


def everything(_name: str) -> bool:
    return True


def reachable(index: Index, reference: Reference, sees: Sees) -> Index:
    """An index in which `reference` is found as in `index` where it is seen; else an empty one.

    Whether it is seen is asked before anything is looked up, so that what is hidden and what is
    absent go the same way.
    """
    if not sees(reference.name):
        return Index()
    alias = index.aliases.get(reference.name)
    return index if alias is None or _leads_to_seen(alias, sees) else Index()


def seen(index: Index, sees: Sees) -> Index:
    """The part of an index that is seen."""
    return replace(
        index,
        entries={name: entry for name, entry in index.entries.items() if sees(name)},
        aliases={
            name: alias
            for name, alias in index.aliases.items()
            if sees(name) and _leads_to_seen(alias, sees)
        },
    )


def _leads_to_seen(alias: Alias, sees: Sees) -> bool:
    drafter = None if alias.turbo is None else parse_reference(alias.turbo).name
    return sees(alias.name) and (drafter is None or sees(drafter))
