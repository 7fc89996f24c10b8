"""Texts under adapters that change the tokenizer: added tokens, other ends, a chat template.

Each is made once, on a thread, for all adapters that change the same, and kept while it is among
those used last. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from cachetools import LRUCache

from quickchange_server.errors import AdapterFailedError
from quickchange_server.frontend.tokenizer import Text
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.errors import AdapterNotFoundError, CorruptVersionError

KEPT = 16  # a tokenizer of 150,000 pieces takes some 50 MB


class OwnTokenizer(NamedTuple):
    """The tokenizer of an adapter that changes the base's."""

    digest: str  # of a version that has it
    content: str  # digest of what it changes


class AdapterTexts:
    """The base's text, and those of adapters."""

    def __init__(self, base: Text, changes: Callable[[str], TokenizerChanges | None]) -> None:
        """`changes` reads a version's; it may take as long as a version's download."""
        self._base = base
        self._changes = changes
        self._texts: LRUCache[str, asyncio.Future[Text]] = LRUCache(KEPT)  # by content
        self._kept: LRUCache[str, Text] = LRUCache(KEPT)  # of `now`

    async def of(self, own: OwnTokenizer | None) -> Text:
        """The text under a tokenizer; None: the base's.

        Raises AdapterFailedError where it can't be read, and StoreUnavailableError.
        """
        if own is None:
            return self._base
        making = self._texts.get(own.content)
        if making is None:
            making = asyncio.ensure_future(asyncio.to_thread(self._made, own.digest))
            self._texts[own.content] = making
            making.add_done_callback(partial(self._drop_failed, own.content))
        return await asyncio.shield(making)

    def now(self, own: OwnTokenizer | None) -> Text:
        """The same for callers without an event loop, on their own thread."""
        if own is None:
            return self._base
        kept = self._kept.get(own.content)
        if kept is None:
            kept = self._kept[own.content] = self._made(own.digest)
        return kept

    def _drop_failed(self, content: str, made: asyncio.Future[Text]) -> None:
        """Let the next request try again."""
        if made.cancelled() or made.exception() is not None:
            self._texts.pop(content, None)

    def _made(self, digest: str) -> Text:
        try:
            changes = self._changes(digest)
            return self._base if changes is None else self._base.changed(changes)
        except (AdapterNotFoundError, CorruptVersionError, ValueError) as error:
            raise AdapterFailedError(f"model: its tokenizer: {error}", param="model") from error
