"""The engine as a process: one duplex channel, one loop. No HTTP, no asyncio.

Spawned and supervised by the API process. It ends on `Shutdown`, when the channel closes (the API
process is gone), or by a crash, after which the supervisor starts a new one. Signals are left to
the supervisor, which drains and then sends `Shutdown`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait

import torch

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.parallel.followers import Followers
from quickchange_server.errors import SettingError
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.protocol import (
    Began,
    Begin,
    Cancel,
    Command,
    Fatal,
    Forget,
    Pin,
    Ping,
    Prefetch,
    Prices,
    Pulse,
    Ready,
    Shutdown,
    StepStats,
    Submit,
)
from quickchange_server.spec_decode.prompt_lookup import TokenText
from quickchange_server.structured_output.compiler import ConstraintCompiler
from quickchange_server.workers.process_memory import release_unused_memory
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
    """Load the model at `Begin`, send `Ready`, then serve until `Shutdown` or a closed channel."""
    try:
        begin: Begin = connection.recv()
    except EOFError:
        return  # the API process is gone
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    waker = Waker()

    def fail(reason: object) -> None:
        connection.send(Fatal(f"the engine could not start: {reason}"))

    with ExitStack() as stack:
        followers = None
        try:
            if settings.tensor_parallel > 1:
                followers = stack.enter_context(Followers(settings, fail))
            engine, ready = _start(
                settings, read_tokenizer, begin.prices, connection, waker, followers
            )
        except (SettingError, ValueError, OSError, RuntimeError) as error:
            if followers is not None:
                followers.blame()
            fail(error)
            return
        connection.send(ready)
        gc.collect()
        gc.freeze()  # modules and libraries: a collection would walk them all within a step
        release_unused_memory()
        try:
            _serve(connection, engine, waker)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the API process is gone: nobody is left to answer
        finally:
            engine.close()


def _start(
    settings: Settings,
    read_tokenizer: ReadTokenizer,
    prices: Prices,
    connection: Connection,
    waker: Waker,
    followers: Followers | None,
) -> tuple[Engine, Ready]:
    started = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        tokenizer = beside.submit(read_tokenizer, settings)
        model = load_model(
            settings.model,
            dtype=settings.dtype,
            device=torch.device(settings.device),
            adapters=settings.adapters,
            quantization=settings.quantization,
            deterministic=settings.deterministic,
            extra_vocabulary=settings.spare_tokens,
            model_check=settings.model_check,
            ranks=None if followers is None else followers.join(),
        )
        store = Store(*settings.store_opening)
        text, constraints = tokenizer.result()
    engine = Engine(
        model,
        settings,
        load_adapter=store.load,
        on_wake=waker.wake,
        text=text,
        constraints=constraints,
        prices=prices,
        on_begun=lambda request_ids: connection.send(Began(request_ids)),
        followers=followers,
    )
    return engine, engine.ready(time.monotonic() - started)


def _serve(connection: Connection, engine: Engine, waker: Waker) -> None:
    told: StepStats | None = None  # the last that were sent, if nobody has asked since
    while True:
        while connection.poll():
            command: Command = connection.recv()
            if isinstance(command, Shutdown):
                for landed in engine.land():
                    connection.send(landed)
                return
            if isinstance(command, Ping):
                told = None
            else:
                _obey(engine, command)
        for move in engine.poll_adapters():
            connection.send(move)
        step = engine.step()
        if step is not None:
            connection.send(step)
            told = step.stats
            continue
        stats = engine.stats()
        if told is None or told.between_steps() != stats:
            connection.send(Pulse(stats))
            told = stats
        wait([connection, waker.fileno()])
        waker.clear()


def _obey(engine: Engine, command: Command) -> None:
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
