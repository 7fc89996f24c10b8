"""A child process that runs functions that need torch, so that this one needs none.

On Linux it is forked from the process that engines are forked from, which may have the modules
already (`entrypoints/engine_start.py`): it then begins in a few hundredths of a second, else in
seconds. Knows nothing of what it runs.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeVar, cast

from quickchange_server.errors import WorkerFailedError

LINGER_SECONDS = 5.0  # a process that outlives its pipe for longer is killed

T = TypeVar("T")

logger = logging.getLogger(__name__)


def torch_is_loaded() -> bool:
    """True if this process has torch anyway, so that a worker would spare it nothing."""
    return "torch" in sys.modules


def run_apart(work: Callable[..., T], *arguments: object) -> T:
    """What a function returns or raises, run in a worker unless this process has torch.

    It can be pickled, as its arguments can. Raises WorkerFailedError.
    """
    if torch_is_loaded():
        return work(*arguments)
    with TorchWorker() as worker:
        return worker.run(work, *arguments)


class TorchWorker:
    """Runs one function at a time, in a process that starts with the first. A context manager."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._running: tuple[BaseProcess, Connection] | None = None

    def __enter__(self) -> TorchWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What `work`, a function that can be pickled, returns or raises. Blocks its thread.

        Raises WorkerFailedError where the process ends before it is done.
        """
        with self._turn:
            if self._running is None:
                self._running = _started()
            process, connection = self._running
            try:
                connection.send((work, arguments))
                done, outcome = connection.recv()
            except (EOFError, OSError) as error:
                self._end()
                logger.error(
                    "a worker (process %s) ended: exit code %s", process.pid, process.exitcode
                )
                raise WorkerFailedError(
                    "a process of the server ended in the middle of its work, perhaps for want of "
                    "memory; the server's log says more"
                ) from error
        if done:
            return cast(T, outcome)
        raise outcome

    def end(self) -> None:
        """End the process once it is done with what it runs; another `run` starts a new one."""
        with self._turn:
            self._end()

    def end_unless_busy(self) -> None:
        """The same, but for a process that runs something, which stays."""
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    def _end(self) -> None:
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        connection.close()
        process.join(LINGER_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        atexit.unregister(process.kill)


def _started() -> tuple[BaseProcess, Connection]:
    context = _context()
    ours, theirs = context.Pipe(duplex=True)
    process = context.Process(target=_serve, args=(theirs,), name="quickchange-worker", daemon=True)
    process.start()
    theirs.close()  # otherwise the pipe would stay open after the process's end
    atexit.register(process.kill)
    return process, ours


def _context() -> ForkServerContext | SpawnContext:
    if sys.platform == "linux":
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _serve(connection: Connection) -> None:
    """Run what comes through the pipe, until it is closed."""
    # A signal to the whole service must not end an import: the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            work, arguments = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_outcome(work, arguments))


def _outcome(work: Callable[..., object], arguments: tuple[object, ...]) -> tuple[bool, object]:
    """True and the result, or false and the error in a form that crosses the pipe."""
    try:
        return True, work(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a class whose arguments are not those of its __init__
            return False, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return False, error
