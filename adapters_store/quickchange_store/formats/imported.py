"""What every reader returns."""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter


@dataclass(frozen=True)
class Imported:
    """An adapter in the canonical form, and what its owner should be told about it."""

    adapter: CanonicalAdapter
    warnings: tuple[str, ...] = ()
