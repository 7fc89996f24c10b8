"""The first rank's side of its followers: it starts them, orders, and ends as they end.

All ranks are one engine: if a follower ends, so does this process, in the same way, and the
supervisor starts another group. If this process ends, its followers do.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.adapters.paced_copies import Pause, no_pause
from quickchange_server.adapters.packing import AdapterImage
from quickchange_server.config import Settings
from quickchange_server.engine.parallel.follower import follow
from quickchange_server.engine.parallel.orders import (
    Allocate,
    Answer,
    Close,
    Failed,
    Free,
    InstallCaches,
    MakePool,
    Order,
    Pass,
    Publish,
    Replay,
    Write,
    Written,
)
from quickchange_server.engine.parallel.pass_inputs import flattened
from quickchange_server.errors import AdapterFailedError, SettingError
from quickchange_server.model.forward_context import ForwardContext
from quickchange_server.model.graphs.cuda_graphs import Capture, Outputs
from quickchange_server.model.parallel.ranks import LOOPBACK, Ranks, join

_NOTICE_SECONDS = 1.0  # within which the end of one rank shows in another
_CLOSE_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Followers:
    """Ranks 1 to N - 1, as processes that live no longer than this context."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        """Start them. They load their part of the model while this process loads its own.

        tell: takes the words in which a follower failed, before this process ends for it.
        Raises SettingError if there are too few GPUs.
        """
        ranks = settings.tensor_parallel
        if settings.device == "cuda" and (gpus := torch.cuda.device_count()) < ranks:
            raise SettingError(
                f"--tensor-parallel {ranks} (or QUICKCHANGE_TENSOR_PARALLEL): this machine shows "
                f"{gpus} GPUs; give so many at most, or a CUDA_VISIBLE_DEVICES that shows more",
                param="tensor_parallel",
            )
        self._settings = settings
        self._tell = tell
        self._door = socket.create_server((LOOPBACK, 0))
        self._port = self._door.getsockname()[1]
        self._lock = threading.Lock()
        self._writes: dict[int, list[Future[None]]] = {}  # by slot, one for each follower
        self._pool: _LeadingPool | None = None
        self._graphs = 0  # captured so far
        self._closing = False
        self._failed: str | None = None  # a follower's last words
        self._processes: dict[Connection, BaseProcess] = {}
        context = _context(settings)
        for rank in range(1, ranks):
            connection, theirs = context.Pipe(duplex=True)
            process = context.Process(
                target=follow,
                args=(theirs, settings, rank, self._port),
                name=f"quickchange-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes[connection] = process
        self._watch = threading.Thread(target=self._listen, name="ranks-watch", daemon=True)
        self._watch.start()

    def join(self) -> Ranks:
        """Meet them, as rank 0."""
        self._ranks = join(0, self._settings, self._port, self._door.detach())
        return self._ranks

    # --- orders ---------------------------------------------------------------------------------

    def install_caches(
        self, *, num_blocks: int, block_size: int, state_rows: int, dtype: torch.dtype
    ) -> None:
        self._order(InstallCaches(num_blocks, block_size, state_rows, dtype))

    def forward(self, context: ForwardContext | None, given: tuple[Any, ...]) -> None:
        """Let them run the pass that this rank is about to run; `given` are its other inputs."""
        usual = None if self._pool is None else self._pool.tables
        layout, buffer = flattened((context, given), usual)
        self._order(Pass(layout, self._graphs if _capturing() else None))
        self._ranks.share(buffer)

    def capture(self, capture: Capture) -> Capture:
        """A `Capture` whose graphs are captured and replayed by them too."""

        def both(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
            replay, outputs = capture(compute)
            number = self._graphs
            self._graphs += 1

            def replay_all() -> None:
                self._order(Replay(number))
                replay()

            return replay_all, outputs

        return both

    def pool(
        self,
        groups: Sequence[ModuleGroup],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        **named: Any,
    ) -> DevicePool:
        """This rank's `DevicePool`, which theirs follow."""
        self._order(MakePool(budget_bytes, dtype, named))
        self._pool = _LeadingPool(groups, budget_bytes, dtype, device, **named)
        self._pool.followers = self
        return self._pool

    def allocate(self, slot: int, image: AdapterImage) -> None:
        self._order(Allocate(slot, replace(image, data=None)))  # type: ignore[arg-type]

    def write(self, slot: int, digest: str) -> list[Future[None]]:
        """Let them write an adapter's pages; done when the futures are. On any thread."""
        self._writes[slot] = [Future() for _ in self._processes]
        self._order(Write(slot, digest))
        return self._writes[slot]

    def publish(self, slot: int) -> None:
        self._order(Publish(slot))

    def free(self, slot: int) -> None:
        self._order(Free(slot))

    def _order(self, order: Order) -> None:
        with self._lock:
            for connection in self._processes:
                connection.send(order)

    # --- ends -----------------------------------------------------------------------------------

    def __enter__(self) -> Followers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them; where one of them caused the error, this process ends as it did."""
        if error is not None:
            self.blame()
        self._closing = True
        if error is None:
            with suppress(OSError):  # one that failed is gone already
                self._order(Close())
        until = time.monotonic() + _CLOSE_SECONDS
        for process in self._processes.values():
            if error is None:
                process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
        self._door.close()

    def blame(self) -> None:
        """End this process as a follower did, if the error came of its end."""
        ends = [process.sentinel for process in self._processes.values()]
        if wait(ends, timeout=_NOTICE_SECONDS):
            self._watch.join()
        self._closing = True  # what happens to them from now on comes of the error

    def _listen(self) -> None:
        """Take answers until a follower ends, which ends this process."""
        order = list(self._processes)
        while True:
            for connection in wait(order):
                assert isinstance(connection, Connection)
                try:
                    answer: Answer = connection.recv()
                except (EOFError, OSError):
                    return self._ended(self._processes[connection])
                self._take(answer, order.index(connection))

    def _take(self, answer: Answer, number: int) -> None:
        match answer:
            case Written(slot, None):
                self._writes[slot][number].set_result(None)
            case Written(slot, str(error)):
                self._writes[slot][number].set_exception(AdapterFailedError(error))
            case Failed(error) if self._failed is None:  # the others' come of the first one's
                self._failed = f"rank {number + 1}: {error}"

    def _ended(self, process: BaseProcess) -> None:
        if self._failed is not None:
            time.sleep(_NOTICE_SECONDS)  # this rank may be about to fail for the same reason
        if self._closing:
            return
        process.join(_CLOSE_SECONDS)
        logger.error("%s ended with code %s: the engine ends", process.name, process.exitcode)
        if self._failed is not None:
            self._tell(self._failed)
        code = process.exitcode or 1
        if code < 0:  # by a signal, whose meaning for requests the supervisor judges
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
            os.kill(os.getpid(), -code)
        os._exit(1)


def _capturing() -> bool:
    """True while what the device is given goes into a captured graph and is not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _context(settings: Settings) -> ForkContext | SpawnContext:
    """The context in which followers start.

    On a CPU they are forked before this process has threads that compute, which spares them to load
    the engine's modules; a GPU's driver does not survive that.
    """
    if settings.device == "cpu" and sys.platform == "linux":
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


class _LeadingPool(DevicePool):
    """Rank 0's pool: what it does, the followers' pools do too."""

    followers: Followers

    def allocate(self, image: AdapterImage) -> int | None:
        slot = super().allocate(image)
        if slot is not None:
            self.followers.allocate(slot, image)
        return slot

    def write(self, slot: int, image: AdapterImage, pause: Pause = no_pause) -> None:
        theirs = self.followers.write(slot, image.digest)
        try:
            super().write(slot, image, pause)
        finally:
            futures.wait(theirs)  # their pages must not be given away meanwhile
        for each in theirs:
            each.result()

    def publish(self, slot: int) -> None:
        super().publish(slot)
        self.followers.publish(slot)

    def free(self, slot: int) -> None:
        super().free(slot)
        self.followers.free(slot)
