"""Import of adapters into the store while requests run: one at a time, on a thread; a few that lie
elsewhere are fetched meanwhile.

Validation reads every tensor, so it must not block the event loop. HTTP is not known here.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from quickchange_server.errors import ConflictError, InvalidRequestError
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.formats.rank_limits import EXACT_ONLY, RankLimits
from quickchange_store.importing import Added, add_adapter, add_unless_known
from quickchange_store.sources.adapter_url import AdapterUrl
from quickchange_store.sources.fetching import fetched
from quickchange_store.store import Store

_FETCHES = 4  # at once


class Imports:
    """Imports adapters. `base` makes, once, the spec of the base that adapters must fit.

    `refuse_name` raises if a name is taken by something that is not in the store. An adapter that
    is fetched has at most `most_bytes`.
    """

    def __init__(
        self,
        store: Store,
        base: Callable[[], BaseSpec],
        base_names: tuple[str, ...],
        refuse_name: Callable[[str], None],
        most_bytes: int | None = None,
        spare_tokens: int | None = None,
    ) -> None:
        """spare_tokens: that the served model has rows for; None: any number."""
        self._refuse_name = refuse_name
        self._store = store
        self._make_base = base
        self._base_names = base_names
        self._base: BaseSpec | None = None
        self._turn = asyncio.Lock()
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._most_bytes = most_bytes
        self._spare_tokens = spare_tokens

    async def add(
        self, name: str, place: Path | AdapterUrl, limits: RankLimits = EXACT_ONLY
    ) -> Added:
        """Check the adapter in a folder or at a URL and publish it as `name`.

        Raises StoreError, ConflictError if the name is taken, InvalidRequestError if the folder
        can't be read, and OSError if the store can't be written.
        """
        self.refuse_taken(name)
        if isinstance(place, Path):
            return await self._add(name, place, limits, None)
        async with AsyncExitStack() as stack:
            async with self._fetches:  # others are imported meanwhile
                opening = fetched(place, self._most_bytes)
                there = await asyncio.to_thread(opening.__enter__)
                stack.push(opening)
            return await self._add(name, there.folder, limits, there.origin)

    async def compose(self, name: str, terms: Sequence[GivenTerm]) -> Added:
        """Publish the weighted sum of adapters as `name`. Raises StoreError, ConflictError."""
        self.refuse_taken(name)
        async with self._turn:
            return Added(await asyncio.to_thread(compose, self._store, name, terms), ())

    async def add_unless_known(self, name: str, folder: Path) -> Added | None:
        """Publish what is in a folder unless it is a version of `name` already. Raises as `add`."""
        self.refuse_taken(name)
        async with self._turn:
            return await asyncio.to_thread(
                lambda: add_unless_known(self._store, name, folder, self._spec())
            )

    def refuse_taken(self, name: str) -> None:
        """Raise ConflictError if `name` is the base model's or an experiment's."""
        self._refuse_name(name)
        if name in self._base_names:
            raise ConflictError(
                f"name: {name!r} is the base model; choose another name", param="name"
            )

    async def _add(
        self, name: str, folder: Path, limits: RankLimits, origin: Mapping[str, str] | None
    ) -> Added:
        async with self._turn:
            try:
                return await asyncio.to_thread(
                    lambda: add_adapter(self._store, name, folder, self._spec(), limits, origin)
                )
            except OSError as error:
                if not _is_of(error, folder):
                    raise
                raise InvalidRequestError(
                    f"path: {error.filename} can't be read: {error.strerror}",
                    param="path",
                ) from error

    def _spec(self) -> BaseSpec:
        if self._base is None:
            self._base = replace(self._make_base(), spare_tokens=self._spare_tokens)
        return self._base


def _is_of(error: OSError, directory: Path) -> bool:
    """True if the error is of a file in the client's folder, not of one of the server."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename is None:
        return False
    return Path(os.fsdecode(error.filename)).is_relative_to(directory)
