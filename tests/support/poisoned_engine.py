"""The real engine, with a request that ends its process by a signal, as a native fault does."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from quickchange_server.config import Settings

POISON = 96  # the first token of the prompt


def main(connection: Connection, settings: Settings) -> None:
    """An engine process's entry."""
    from quickchange_server.engine.model_runner import Runner
    from quickchange_server.entrypoints.engine_start import engine_main

    inputs = Runner._inputs

    def poisoned(self: Runner, plan: Sequence[Any]) -> Any:
        if any(item.sequence.tokens[0] == POISON for item in plan):
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        return inputs(self, plan)

    Runner._inputs = poisoned  # type: ignore[method-assign]
    engine_main(connection, settings)
