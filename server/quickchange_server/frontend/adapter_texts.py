"""Texts under adapters that change the tokenizer: added tokens, other ends, a chat template.

Each is made once, on a thread, and kept while it is among those used last. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from cachetools import LRUCache

from quickchange_server.errors import AdapterFailedError
from quickchange_server.frontend.tokenizer import Text
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.errors import AdapterNotFoundError, CorruptVersionError

KEPT = 16  # a tokenizer of 150,000 pieces takes some 50 MB


class AdapterTexts:
    """The base's text, and those of adapters by the digests of their versions."""

    def __init__(self, base: Text, changes: Callable[[str], TokenizerChanges | None]) -> None:
        """`changes` reads a version's; it may take as long as a version's download."""
        self._base = base
        self._changes = changes
        self._texts: LRUCache[str, asyncio.Future[Text]] = LRUCache(KEPT)
        self._kept: LRUCache[str, Text] = LRUCache(KEPT)  # of `now`

    async def of(self, digest: str | None) -> Text:
        """The text under the tokenizer of a version; None: the base's.

        Raises AdapterFailedError where it can't be read, and StoreUnavailableError.
        """
        if digest is None:
            return self._base
        making = self._texts.get(digest)
        if making is None:
            making = asyncio.ensure_future(asyncio.to_thread(self._made, digest))
            self._texts[digest] = making
            making.add_done_callback(partial(self._drop_failed, digest))
        return await asyncio.shield(making)

    def now(self, digest: str | None) -> Text:
        """The same for callers without an event loop, on their own thread."""
        if digest is None:
            return self._base
        kept = self._kept.get(digest)
        if kept is None:
            kept = self._kept[digest] = self._made(digest)
        return kept

    def _drop_failed(self, digest: str, made: asyncio.Future[Text]) -> None:
        """Let the next request try again."""
        if made.cancelled() or made.exception() is not None:
            self._texts.pop(digest, None)

    def _made(self, digest: str) -> Text:
        try:
            changes = self._changes(digest)
            return self._base if changes is None else self._base.changed(changes)
        except (AdapterNotFoundError, CorruptVersionError, ValueError) as error:
            raise AdapterFailedError(f"model: its tokenizer: {error}", param="model") from error
