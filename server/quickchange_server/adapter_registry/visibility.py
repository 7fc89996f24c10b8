"""Visibility of the store's names to a caller: a hidden name looks like one that does not exist.

An alias is visible if its own name and the names that it reveals are. Keys and HTTP are not known
here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quickchange_store.index import Alias, Index
from quickchange_store.names import Reference, parse_reference

Sees = Callable[[str], bool]  # True if a name without version exists for the caller


def everything(_name: str) -> bool:
    return True


def reachable(index: Index, reference: Reference, sees: Sees) -> Index:
    """`index` if `reference` is visible, otherwise an empty index.

    Visibility is checked before any lookup, so that hidden and absent names take the same path.
    """
    if not sees(reference.name):
        return Index()
    alias = index.aliases.get(reference.name)
    return index if alias is None or _leads_to_seen(alias, sees) else Index()


def seen(index: Index, sees: Sees) -> Index:
    """The visible part of an index."""
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
