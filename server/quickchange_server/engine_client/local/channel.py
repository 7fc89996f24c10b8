"""One engine process and the two threads that carry messages to and from it.

On a CPU the process is forked from a helper process that may have loaded the engine's modules
before (`entrypoints/engine_start.py`), which is most of a start's time. CUDA has a process of its
own from the beginning, since a driver does not survive a fork.

The event loop waits for neither the pipe nor the process: a reader thread hands each report to
the loop, a writer thread sends queued commands. Only `Ready` and `Fatal` are interpreted here. A
channel serves one engine process and is not reused.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

from quickchange_server.config import Settings
from quickchange_server.protocol import Begin, Command, Fatal, Ready, Report

EngineMain = Callable[[Connection, Settings], None]  # the engine process's entry point
T = TypeVar("T")
LINGER_SECONDS = 5.0  # a process that outlives its pipe for longer is killed

_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM}  # exit codes that no code of ours causes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Death:
    """End of an engine, in words. `outside`: by a signal that its own work did not raise, such as a
    kill -9, which says nothing of the requests that it had."""

    reason: str
    outside: bool


class EngineChannel:
    """A running engine. Construct it on the event loop, whose thread then gets every callback.

    `ready` resolves to the engine's Ready; `ended` resolves once, after the last report, to how
    the process ended. Other reports go to `on_report`.
    """

    def __init__(
        self,
        main: EngineMain,
        settings: Settings,
        on_report: Callable[[Report], None],
        begin: Begin,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self.ended: asyncio.Future[Death] = self._loop.create_future()
        self.reports = 0  # that have come, of any kind
        self._on_report = on_report
        self._fatal: Fatal | None = None
        self._given_up: str | None = None  # why it was killed, if by `give_up`
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outbox.put(begin)
        context = _context(settings)
        self._connection, theirs = context.Pipe(duplex=True)
        self._process: BaseProcess = context.Process(
            target=_run_engine, args=(main, theirs, settings), name="quickchange-engine"
        )
        # Blocks the loop for a few milliseconds; on a thread it could outlive a cancellation.
        self._process.start()
        theirs.close()  # otherwise the pipe would stay open after the engine's end
        self.pid = self._process.pid
        atexit.register(self.kill)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer.start()
        self._reader.start()

    def send(self, command: Command) -> None:
        """Queue a command; it is lost if the engine ends first."""
        self._outbox.put(command)

    def kill(self) -> None:
        """End the process at once. `ended` follows."""
        self._process.kill()

    def give_up(self, reason: str) -> None:
        """Kill an engine that hangs, for `reason`."""
        self._given_up = reason
        self.kill()

    def _write(self) -> None:
        while (command := self._outbox.get()) is not None:
            try:
                self._connection.send(command)
            except OSError:
                return  # the engine is gone; the reader reports it

    def _read(self) -> None:
        try:
            while True:
                self._hand_over(self._deliver, self._connection.recv())
        except (EOFError, OSError):
            pass  # the engine is gone, perhaps in the middle of a message
        except (pickle.UnpicklingError, AttributeError, ImportError, TypeError):
            logger.exception("the engine sent a message that can't be read; ending it")
            self.kill()
        self._hand_over(self._end, self._reap())

    def _reap(self) -> int | None:
        """Wait for the process to end. Returns its exit code."""
        self._process.join(LINGER_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        atexit.unregister(self.kill)
        self._outbox.put(None)
        self._writer.join()
        self._connection.close()
        return self._process.exitcode

    def _hand_over(self, callback: Callable[[T], None], argument: T) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            self.kill()  # the loop is closed, so no client is left

    def _deliver(self, report: Report) -> None:
        self.reports += 1
        match report:
            case Ready():
                if not self.ready.done():
                    self.ready.set_result(report)
            case Fatal():
                self._fatal = report
            case _:
                self._on_report(report)

    def _end(self, code: int | None) -> None:
        outside = self._given_up is None and code in _FROM_OUTSIDE
        self.ended.set_result(Death(self._reason(code), outside))

    def _reason(self, code: int | None) -> str:
        if self._fatal is not None:
            return _words(self._fatal)
        if self._given_up is not None:
            return self._given_up
        early = "" if self.ready.done() else " before it was ready; its log says more"
        return describe_exit(code) + early


def _context(settings: Settings) -> ForkServerContext | SpawnContext:
    if settings.device == "cpu" and sys.platform == "linux":
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def describe_exit(code: int | None) -> str:
    """A multiprocessing exit code in words; negative codes are signals."""
    if code is None or code >= 0:
        return f"the engine process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by hand, or for want of memory)" if name == "SIGKILL" else ""
    return f"the engine process was ended by {name}{hint}"


def _words(fatal: Fatal) -> str:
    return f"{fatal.error} (setting: {fatal.setting})" if fatal.setting else fatal.error


def _run_engine(main: EngineMain, connection: Connection, settings: Settings) -> None:
    """Run `main` in the engine process, which only the API process ends and never outlives it."""
    # Ctrl-C and service managers signal every process of the service, but the engine is still
    # needed during the drain that follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    main(connection, settings)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the main thread may be in the middle of a step, or stuck
