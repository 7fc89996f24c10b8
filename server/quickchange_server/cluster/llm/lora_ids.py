"""Model ids `BASE:ADAPTER`, as Ray Serve LLM gives them, over the store's names.

An adapter that such an id names is fetched and imported once, whoever waits for it, and then is a
version like any other. Ray and HTTP are not known here.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.adapter_registry.resolver import Catalog, Named
from quickchange_server.adapter_registry.visibility import Sees
from quickchange_server.errors import UnknownModelError
from quickchange_store.names import RESERVED
from quickchange_store.store import Store

# Fetches an adapter's files into a folder. Raises UnknownModelError where there is no such adapter.
Fetch = Callable[[str, Path], Awaitable[None]]

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TELLING = 60  # characters of an id that its name in the store keeps


def adapter_of(base: str, model_id: str) -> str | None:
    """The adapter in `BASE:ADAPTER`; None for another id."""
    name, colon, adapter = model_id.partition(":")
    return adapter if colon and name == base else None


def store_name(adapter: str) -> str:
    """The adapter's name in the store: its id, or what is left of it with the start of its hash."""
    if _PLAIN.fullmatch(adapter) and adapter.lower() not in RESERVED:
        return adapter
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", adapter).strip("-._")[:_TELLING]
    return f"lora-{kept}-{hashlib.sha256(adapter.encode()).hexdigest()[:12]}"


class LoraIds:
    """The adapters that ids of one base named, by their names in the store."""

    def __init__(self, base: str, store: Store, imports: Imports, fetch: Fetch | None) -> None:
        self.base = base
        self._store = store
        self._imports = imports
        self._fetch = fetch
        self._names: dict[str, str] = {}  # of the adapters that were imported here
        self._loading: dict[str, asyncio.Task[str]] = {}

    def name(self, reference: str) -> str:
        """The store's reference for a model id, or for the adapter's own part of one."""
        adapter = adapter_of(self.base, reference)
        adapter = reference if adapter is None else adapter
        return self._names.get(adapter, adapter)

    async def add(self, modules: Mapping[str, str]) -> list[str]:
        """Import adapters from folders, by their ids; their digests."""
        digests = []
        for adapter, folder in modules.items():
            added = await self._imports.add(store_name(adapter), Path(folder))
            self._names[adapter] = store_name(adapter)
            digests.append(added.version.digest)
        return digests

    async def load(self, model_id: str) -> str | None:
        """Fetch and import the adapter of an id where that was not done; its digest if it was.

        Raises UnknownModelError if neither the bucket nor the store has it, StoreError if it can't
        be served, and what fetching raises.
        """
        adapter = adapter_of(self.base, model_id)
        if adapter is None or adapter in self._names or self._fetch is None:
            return None
        task = self._loading.get(adapter)
        if task is None:
            task = asyncio.create_task(self._import(adapter, self._fetch), name="lora-import")
            self._loading[adapter] = task
            task.add_done_callback(lambda _: self._loading.pop(adapter, None))
        try:
            return await asyncio.shield(task)  # others may wait for it too
        except UnknownModelError:
            if adapter in self._store.names() or adapter in self._store.aliases():
                return None
            raise

    async def _import(self, adapter: str, fetch: Fetch) -> str:
        _check(adapter)
        with tempfile.TemporaryDirectory(
            prefix="quickchange-lora-", ignore_cleanup_errors=True
        ) as folder:
            await fetch(adapter, Path(folder))
            added = await self._imports.add(store_name(adapter), Path(folder))
        self._names[adapter] = store_name(adapter)
        return added.version.digest


def _check(adapter: str) -> None:
    """Refuse an id that is no folder's own path."""
    if any(part in ("", ".", "..") for part in adapter.split("/")):
        raise UnknownModelError(
            f"model: {adapter!r} is no adapter's id; GET /v1/models lists what there is",
            param="model",
        )


class LoraCatalog(Catalog):
    """A catalog that also knows the ids of `ids`."""

    def __init__(self, store: Store, ids: LoraIds, *, adapters: bool, turbo: bool, lookup: bool):
        super().__init__(store, (ids.base,), adapters=adapters, turbo=turbo, prompt_lookup=lookup)
        self._ids = ids

    def _find(self, reference: str, sees: Sees, *, param: str) -> Named:
        name = self._ids.name(reference)
        try:
            return super()._find(name, sees, param=param)
        except UnknownModelError as error:
            if name == reference:
                raise
            raise UnknownModelError(
                f"{param}: there is no model {reference!r}; GET /v1/models lists what there is",
                param=param,
            ) from error
