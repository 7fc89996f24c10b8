"""Adapters that are fetched when a request first names them, from where a pattern says.

Whoever asks for one that is on its way waits for the same fetch, which goes on when they leave.
What came of a fetch is remembered for a while, so that a name that is nowhere costs one look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from cachetools import TTLCache

from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.adapter_registry.visibility import Sees
from quickchange_server.errors import (
    AdapterFailedError,
    QuickchangeError,
    UnavailableError,
)
from quickchange_store.errors import (
    NoAdapterThereError,
    SourceUnavailableError,
    StoreError,
    StoreUnavailableError,
)
from quickchange_store.names import RESERVED, parse_reference
from quickchange_store.sources.adapter_url import adapter_url, is_url
from quickchange_store.store import Store

MOST_WAITED_FOR = 64  # fetches under way and in line
REMEMBERED_SECONDS = 10.0
_RETRY_SECONDS = 5

logger = logging.getLogger(__name__)


class OnDemand:
    """Fetches what requests name. `is_other` tells names that are no adapter's: the base's, an
    experiment's."""

    def __init__(
        self,
        pattern: str,
        imports: Imports,
        store: Store,
        most_names: int,
        is_other: Callable[[str], bool],
    ) -> None:
        self._pattern = pattern
        self._imports = imports
        self._store = store
        self._most_names = most_names
        self._is_other = is_other
        self._under_way: dict[str, asyncio.Task[QuickchangeError | None]] = {}
        self._came: TTLCache[str, QuickchangeError | None] = TTLCache(4096, REMEMBERED_SECONDS)

    async def ensure(self, references: Iterable[str], sees: Sees) -> None:
        """Have those adapters in the store that the store lacks and the pattern finds.

        One that is nowhere is left for the resolver of names to refuse. Raises AdapterFailedError
        for one that can't be served, and UnavailableError where its place can't be read now.
        """
        for reference in references:
            name = self._wanted(reference, sees)
            if name is not None:
                error = await self._outcome(name)
                if error is not None:
                    raise error

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, reference: str, sees: Sees) -> str | None:
        """The name to look for; None where there is nothing to do."""
        try:
            name = parse_reference(reference).name
        except StoreError:
            return None
        index = self._store.snapshot()
        there = name in index.entries or name in index.aliases
        if there or name.lower() in RESERVED or self._is_other(name) or not sees(name):
            return None
        return name

    async def _outcome(self, name: str) -> QuickchangeError | None:
        task = self._under_way.get(name)
        if task is None:
            if name in self._came:
                return self._came[name]
            if len(self._under_way) >= MOST_WAITED_FOR:
                return UnavailableError(
                    "too many adapters are being fetched; send the request again",
                    retry_after=_RETRY_SECONDS,
                )
            if len(self._store.snapshot().entries) >= self._most_names:
                logger.warning("no adapter is fetched: adapter_resolver_names are in the store")
                return None
            task = asyncio.create_task(self._fetch(name), name=f"fetch-{name}")
            self._under_way[name] = task
            task.add_done_callback(lambda _: self._under_way.pop(name, None))
        return await asyncio.shield(task)

    async def _fetch(self, name: str) -> QuickchangeError | None:
        error = await self._fetched(name)
        self._came[name] = error
        return error

    async def _fetched(self, name: str) -> QuickchangeError | None:
        where = self._pattern.replace("{name}", name)
        try:
            if not is_url(where):
                if not Path(where).is_dir():
                    return None
                await self._imports.add(name, Path(where))
            else:
                await self._imports.add(name, adapter_url(where))
        except NoAdapterThereError as error:
            logger.info("%r is not fetched: %s", name, error)
            return None
        except (SourceUnavailableError, StoreUnavailableError) as error:
            logger.warning("%r can't be fetched now: %s", name, error)
            return UnavailableError(
                f"model: {name!r} can't be fetched now; send the request again",
                retry_after=_RETRY_SECONDS,
            )
        except StoreError as error:
            logger.warning("%r is fetched and can't be served: %s", name, error)
            return AdapterFailedError(f"model: {name!r} can't be served: {error}", param="model")
        except QuickchangeError as error:
            return error
        logger.info("%r was fetched from %s", name, where)
        return None
