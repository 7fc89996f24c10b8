"""Result of every format reader."""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter


@dataclass(frozen=True)
class Imported:
    """An adapter in the canonical form, and warnings for its owner."""

    adapter: CanonicalAdapter
    warnings: tuple[str, ...] = ()
