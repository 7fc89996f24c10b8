"""Import of adapters into the store while requests run: one at a time, off the event loop; a few
that lie elsewhere are fetched meanwhile.

HTTP is not known here.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from quickchange_server.adapter_registry.import_runner import ImportRunner
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
    """Imports adapters, by what `runner` runs.

    `refuse_name` raises if a name is taken by something that is not in the store. An adapter that
    is fetched has at most `most_bytes`.
    """

    def __init__(
        self,
        runner: ImportRunner,
        base_names: tuple[str, ...],
        refuse_name: Callable[[str], None],
        most_bytes: int | None = None,
    ) -> None:
        self._refuse_name = refuse_name
        self._runner = runner
        self._base_names = base_names
        self._turn = asyncio.Lock()
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._most_bytes = most_bytes

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
            return await self._runner.run(_compose, name, terms)

    async def add_unless_known(self, name: str, folder: Path) -> Added | None:
        """Publish what is in a folder unless it is a version of `name` already. Raises as `add`."""
        self.refuse_taken(name)
        async with self._turn:
            return await self._runner.run(_add_unless_known, name, folder)

    async def close(self) -> None:
        """Wait for what is imported."""
        await self._runner.close()

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
                return await self._runner.run(_add, name, folder, limits, origin)
            except OSError as error:
                if not _is_of(error, folder):
                    raise
                raise InvalidRequestError(
                    f"path: {error.filename} can't be read: {error.strerror}",
                    param="path",
                ) from error


# --- what the runner runs -----------------------------------------------------------------------


def _add(
    store: Store,
    base: Callable[[], BaseSpec],
    name: str,
    folder: Path,
    limits: RankLimits,
    origin: Mapping[str, str] | None,
) -> Added:
    return add_adapter(store, name, folder, base(), limits, origin)


def _add_unless_known(
    store: Store, base: Callable[[], BaseSpec], name: str, folder: Path
) -> Added | None:
    return add_unless_known(store, name, folder, base())


def _compose(
    store: Store, _base: Callable[[], BaseSpec], name: str, terms: Sequence[GivenTerm]
) -> Added:
    return Added(compose(store, name, terms), ())


def _is_of(error: OSError, directory: Path) -> bool:
    """True if the error is of a file in the client's folder, not of one of the server."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename is None:
        return False
    return Path(os.fsdecode(error.filename)).is_relative_to(directory)
