"""The engine as a process: one duplex channel, one loop. No HTTP, no asyncio.

Spawned and supervised by the API process. It ends on `Shutdown`, when the channel closes (the API
process is gone), or by a crash, after which the supervisor starts a new one. Signals are left to
the supervisor, which drains and then sends `Shutdown`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine, torch_dtype
from quickchange_server.errors import SettingError
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
from quickchange_server.spec_decode.prompt_lookup import TokenText
from quickchange_server.structured_output.compiler import ConstraintCompiler
from quickchange_store.store import Store

# Reads the tokenizer for prompt lookup and the grammar compiler; None: the engine has none.
ReadTokenizer = Callable[[Settings], tuple[TokenText | None, ConstraintCompiler | None]]


class Waker:
    """Wakes the engine loop from any thread; wake-ups coalesce."""

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


def main(connection: Connection, settings: Settings, read_tokenizer: ReadTokenizer) -> None:
    """Load the model, send `Ready`, then serve until `Shutdown` or a closed channel."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    waker = Waker()
    try:
        engine, ready = _start(settings, read_tokenizer, waker.wake)
    except (SettingError, ValueError, OSError, RuntimeError) as error:
        connection.send(Fatal(f"the engine could not start: {error}"))
        return
    connection.send(ready)
    try:
        _serve(connection, engine, waker)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone: nobody is left to answer
    finally:
        engine.close()


def _start(
    settings: Settings, read_tokenizer: ReadTokenizer, on_wake: Callable[[], None]
) -> tuple[Engine, Ready]:
    started = time.monotonic()
    model = load_model(
        settings.model,
        dtype=torch_dtype(settings.dtype),
        device=torch.device(settings.device),
        adapters=settings.adapters,
        quantization=settings.quantization,
    )
    store = Store(settings.store)
    text, constraints = read_tokenizer(settings)
    engine = Engine(
        model,
        settings,
        load_adapter=store.load,
        on_wake=on_wake,
        text=text,
        constraints=constraints,
    )
    return engine, engine.ready(time.monotonic() - started)


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
