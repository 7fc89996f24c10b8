"""An adapter's canonical bytes in memory: what `write` puts into a file and `digest` hashes."""

from __future__ import annotations

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter


def to_bytes(adapter: CanonicalAdapter) -> bytes:
    """The same for the same content, on any machine. Raises as `write`."""
    return b"".join(adapter_bytes._chunks(adapter))
