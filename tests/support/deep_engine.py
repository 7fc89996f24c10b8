"""The real engine with two steps in flight, as on a GPU."""

from __future__ import annotations

from functools import partialmethod
from multiprocessing.connection import Connection

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.entrypoints.engine_start import engine_main


def main(connection: Connection, settings: Settings) -> None:
    """Main function of an engine's process."""
    Engine.__init__ = partialmethod(Engine.__init__, depth=2)  # type: ignore[assignment, method-assign]
    engine_main(connection, settings)
