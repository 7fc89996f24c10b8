"""An adapter's canonical bytes in memory: what `write` puts into a file and `digest` hashes."""

from __future__ import annotations

from quickchange_store.canonical import canonical_adapter
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter


def to_bytes(adapter: CanonicalAdapter) -> bytes:
    """The same for the same content, on any machine. Raises as `write`."""
    return b"".join(canonical_adapter._chunks(adapter))
