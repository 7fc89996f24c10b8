"""The engine as a process: one duplex channel, one loop. No HTTP, no asyncio.

Spawned and supervised by the API process. It ends on `Shutdown`, when the channel closes (the API
process is gone), or by a crash, after which the supervisor starts a new one. Signals are left to
the supervisor, which drains and then says `Shutdown`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine, torch_dtype
from quickchange_server.errors import SettingError
from quickchange_server.frontend.tokenizer import Text, token_text
from quickchange_server.model.model_loader import load_model
from quickchange_server.protocol import (
    Cancel,
    Command,
    Fatal,
    Forget,
    Pin,
    Prefetch,
    Ready,
    Report,
    Shutdown,
    Submit,
)
from quickchange_server.structured_output.errors import ConstraintError
from quickchange_server.structured_output.grammar import TokenGrammars
from quickchange_store.store import Store

logger = logging.getLogger(__name__)


class Waker:
    """Wakes the loop from another thread; coalesces."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        try:
            os.write(self._write, b"w")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already

    def clear(self) -> None:
        try:
            while os.read(self._read, 4096):
                pass
        except BlockingIOError:
            return


def main(connection: Connection, settings: Settings) -> None:
    """Load the model, say `Ready`, then serve until told to end."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    waker = Waker()
    try:
        engine, ready = _start(settings, waker.wake)
    except (ValueError, OSError, RuntimeError) as error:
        connection.send(Fatal(f"the engine could not start: {error}"))
        return
    connection.send(ready)
    try:
        _serve(connection, engine, waker)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone: nobody is left to answer
    finally:
        engine.close()


def _start(settings: Settings, on_wake: Callable[[], None]) -> tuple[Engine, Ready]:
    started = time.monotonic()
    model = load_model(
        settings.model,
        dtype=torch_dtype(settings.dtype),
        device=torch.device(settings.device),
        adapters=settings.adapters,
        quantization=settings.quantization,
    )
    store = Store(settings.store)
    text = _tokenizer(settings)
    lookup = settings.turbo and settings.prompt_lookup
    engine = Engine(
        model,
        settings,
        load_adapter=store.load,
        on_wake=on_wake,
        text=token_text(text) if lookup and text is not None else None,
        constraints=None if text is None else _grammars(text),
    )
    return engine, engine.ready(time.monotonic() - started)


def _tokenizer(settings: Settings) -> Text | None:
    """None where the model has none and nothing asks for one."""
    try:
        return Text.load(settings.model)
    except SettingError:
        if settings.turbo and settings.prompt_lookup:
            raise
        return None


def _grammars(text: Text) -> TokenGrammars | None:
    """None where text can't be constrained; requests that ask for it are then refused."""
    try:
        return TokenGrammars.of(text)
    except ConstraintError as error:
        logger.warning("structured output is not served: %s", error)
        return None


def _serve(connection: Connection, engine: Engine, waker: Waker) -> None:
    while True:
        while connection.poll():
            if not _obey(engine, connection.recv()):
                return
        reports: list[Report] = [*engine.poll_adapters()]
        step = engine.step()
        if step is not None:
            reports.append(step)
        for report in reports:
            connection.send(report)
        if step is None:
            wait([connection, waker.fileno()])
            waker.clear()


def _obey(engine: Engine, command: Command) -> bool:
    """Carry out one command; False ends the loop."""
    match command:
        case Submit():
            engine.submit(command)
        case Cancel(request_id):
            engine.cancel(request_id)
        case Prefetch(digest, tier):
            engine.prefetch(digest, tier)
        case Pin(digest, pinned):
            engine.pin(digest, pinned)
        case Forget(digest):
            engine.forget(digest)
        case Shutdown():
            return False
    return True
