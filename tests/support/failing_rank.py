"""The real engine with a second rank that fails at some of its work."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from quickchange_server.config import Settings
from quickchange_server.engine.parallel import follower
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_store.errors import CorruptVersionError


def unreadable_adapter(connection: Connection, settings: Settings, *, unreadable: str) -> None:
    """Main function of an engine whose second rank can't read one adapter, given by its digest."""
    write = follower._Follower._write

    def failing(self: Any, slot: int, digest: str) -> None:
        if digest == unreadable:
            raise CorruptVersionError("its bytes are not there", remedy="add it again")
        write(self, slot, digest)

    follower._Follower._write = failing  # type: ignore[method-assign]
    engine_main(connection, settings)


def no_memory_at_start(connection: Connection, settings: Settings) -> None:
    """Main function of an engine whose second rank finds no memory."""

    def load_model(*_: object, **__: object) -> None:
        raise MemoryError("no memory for this rank's part")

    follower.load_model = load_model  # type: ignore[assignment]
    engine_main(connection, settings)
