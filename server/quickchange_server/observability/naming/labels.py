"""A bounded set of label values, so that clients can't grow the server's metrics without end."""

from __future__ import annotations

import re

from quickchange_server.protocol import LOOKUP

BASE = "base"  # requests to the plain base model
OTHER = "other"  # every adapter beyond the bound
COMPOSED = "+"  # requests of several adapters at once
RESERVED = frozenset({BASE, OTHER, LOOKUP})  # LOOKUP: drafts that no adapter made
LONGEST = 100  # characters
_UNUSUAL = re.compile(r"[^A-Za-z0-9._@:/+-]")


class AdapterLabels:
    """Label values for names: the first `limit` names keep their own, all others get "other".

    An adapter named like a `reserved` value ("base", "other", "lookup") gets "other" too.
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
