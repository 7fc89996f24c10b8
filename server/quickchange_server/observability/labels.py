"""A bounded set of label values, so that clients can't grow the server's metrics without end."""

from __future__ import annotations

import re

from quickchange_server.protocol import LOOKUP

BASE = "base"  # requests to the plain base model
OTHER = "other"  # every adapter beyond the bound
RESERVED = frozenset({BASE, OTHER, LOOKUP})  # LOOKUP: drafts that no adapter made
LONGEST = 100  # characters
_UNUSUAL = re.compile(r"[^A-Za-z0-9._@:/+-]")


class AdapterLabels:
    """The first `limit` adapter names keep their own value; all others share "other".

    An adapter that is itself called "base", "other" or "lookup" (`reserved`) is counted with the
    others, so that the values' meanings hold.
    """

    def __init__(self, limit: int, reserved: frozenset[str] = RESERVED) -> None:
        self._limit = limit
        self._reserved = reserved
        self._kept: dict[str, str] = {}  # name: label value

    def __call__(self, name: str) -> str:
        kept = self._kept.get(name)
        if kept is None:
            kept = self._new(name)
        return kept

    def _new(self, name: str) -> str:
        if len(self._kept) >= self._limit or name in self._reserved:
            return OTHER
        self._kept[name] = _UNUSUAL.sub("_", name[:LONGEST]) or OTHER
        return self._kept[name]
