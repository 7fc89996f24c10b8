"""Import of adapters into the store while requests run: one at a time, on a thread.

Validation reads every tensor, so it must not block the event loop. HTTP is not known here.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

from quickchange_server.errors import ConflictError, InvalidRequestError
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.importing import Added, add_adapter
from quickchange_store.store import Store


class Imports:
    """Imports adapters. `base` makes, once, the spec of the base that adapters must fit.

    `refuse_name` raises if a name is taken by something that is not in the store.
    """

    def __init__(
        self,
        store: Store,
        base: Callable[[], BaseSpec],
        base_names: tuple[str, ...],
        refuse_name: Callable[[str], None],
    ) -> None:
        self._refuse_name = refuse_name
        self._store = store
        self._make_base = base
        self._base_names = base_names
        self._base: BaseSpec | None = None
        self._turn = asyncio.Lock()

    async def add(self, name: str, directory: Path) -> Added:
        """Check the adapter in `directory` and publish it as `name`.

        Raises StoreError, ConflictError if the name is taken, InvalidRequestError if the folder
        can't be read, and OSError if the store can't be written.
        """
        self.refuse_taken(name)
        async with self._turn:
            try:
                return await asyncio.to_thread(self._add, name, directory)
            except OSError as error:
                if not _is_of(error, directory):
                    raise
                raise InvalidRequestError(
                    f"path: {error.filename} can't be read: {error.strerror}",
                    param="path",
                ) from error

    def refuse_taken(self, name: str) -> None:
        """Raise ConflictError if `name` is the base model's or an experiment's."""
        self._refuse_name(name)
        if name in self._base_names:
            raise ConflictError(
                f"name: {name!r} is the base model; choose another name", param="name"
            )

    def _add(self, name: str, directory: Path) -> Added:
        if self._base is None:
            self._base = self._make_base()
        return add_adapter(self._store, name, directory, self._base)


def _is_of(error: OSError, directory: Path) -> bool:
    """True if the error is of a file in the client's folder, not of one of the server."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename is None:
        return False
    return Path(os.fsdecode(error.filename)).is_relative_to(directory)
