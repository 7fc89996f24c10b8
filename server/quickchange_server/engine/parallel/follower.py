"""A follower: a process that holds one rank's part of the engine's model and does as it is told.

It ends on `Close`, by a crash, or as soon as the first rank is gone, whatever it waits for.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_server.adapters.adapter_loader import Loader, Pacer
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_server.config import Settings
from quickchange_server.engine.parallel.orders import (
    Allocate,
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
from quickchange_server.engine.parallel.pass_inputs import PassLayout, built
from quickchange_server.model.loading.model_loader import LoadedModel, forward, load_model
from quickchange_server.model.parallel.ranks import Ranks, device_of, join
from quickchange_store.store import Store

_BUSY_SECONDS = 0.1  # for so long after a pass, adapters are read in slices
_KILL_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG

logger = logging.getLogger(__name__)


def follow(connection: Connection, settings: Settings, rank: int, port: int) -> None:
    """Main function of a follower's process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the first rank ends when it is to
        signal.signal(number, signal.SIG_IGN)
    _end_with_first_rank()
    said = threading.Lock()

    def say(answer: Written | Failed) -> None:
        with said:
            connection.send(answer)

    try:
        ranks = join(rank, settings, port)
        device = device_of(rank, settings)
        model = load_model(
            settings.model,
            dtype=settings.dtype,
            device=device,
            adapters=settings.adapters,
            quantization=settings.quantization,
            deterministic=settings.deterministic,
            extra_vocabulary=settings.spare_tokens,
            model_check=settings.model_check,
            ranks=ranks,
        )
        follower = _Follower(
            model,
            ranks,
            device,
            Store(*settings.store_opening),
            say,
        )
        while not isinstance(order := connection.recv(), Close):
            follower.obey(order)
    except EOFError:
        return  # the first rank is gone
    except Exception as error:
        say(Failed(str(error) or repr(error)))
        raise


def _end_with_first_rank() -> None:
    if sys.platform == "linux":  # also while this process is stopped
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    threading.Thread(target=_wait_for_parent, name="parent-watch", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the main thread may wait for a rank that is gone


class _Follower:
    """One rank's model, caches and pool of adapters."""

    def __init__(
        self,
        model: LoadedModel,
        ranks: Ranks,
        device: torch.device,
        store: Store,
        say: Callable[[Written], None],
    ) -> None:
        self._model = model
        _silence(model)
        self._ranks = ranks
        self._device = device
        self._store = store
        self._say = say
        self._graphs: dict[int, Callable[[], None]] = {}  # replay them, by number
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._pool: DevicePool | None = None
        self._layouts: dict[int, AdapterImage] = {}  # of the slots in use, without data
        self._loader: Loader[None] = Loader(self._answer)
        self._last_pass = 0.0
        self._pause = Pacer(lambda: time.monotonic() - self._last_pass < _BUSY_SECONDS)

    @property
    def pool(self) -> DevicePool:
        """The pool. Raises RuntimeError before it is made."""
        if self._pool is None:
            raise RuntimeError("adapters before there is a pool for them")
        return self._pool

    def obey(self, order: Order) -> None:
        match order:
            case Replay(graph):
                self._last_pass = time.monotonic()
                self._graphs[graph]()
            case Pass(layout, None):
                self._last_pass = time.monotonic()
                self._run(layout)
            case Pass(layout, int(graph)):
                self._graphs[graph] = _captured(partial(self._run, layout), self._memory)
            case Allocate(slot, image):
                if self.pool.allocate(image) != slot:
                    raise RuntimeError(f"slot {slot} of the first rank is another one here")
                self._layouts[slot] = image
            case Write(slot, digest):
                self._loader.submit(str(slot), lambda: self._write(slot, digest))
            case Publish(slot):
                self.pool.publish(slot)
            case Free(slot):
                self.pool.free(slot)
                del self._layouts[slot]
            case MakePool(budget, dtype, named):
                self._pool = DevicePool(self._model.groups, budget, dtype, self._device, **named)
            case InstallCaches(num_blocks, block_size, state_rows, dtype):
                self._graphs.clear()  # they read the caches that were before
                self._model.install_caches(
                    num_blocks=num_blocks,
                    block_size=block_size,
                    state_rows=state_rows,
                    dtype=dtype,
                    device=self._device,
                )

    def _run(self, layout: PassLayout) -> None:
        """Take a pass's inputs from the first rank and run it."""
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        self._ranks.share(buffer)
        context, given = built(layout, buffer, self._tables)
        self._model.holder.step = context
        try:
            forward(self._model, *given)
        finally:
            self._model.holder.step = None

    def _tables(self, usual: bool) -> LowRankTables:
        return self.pool.tables if usual else self.pool.wide_tables

    def _write(self, slot: int, digest: str) -> None:
        adapter, layout = self._store.load(digest, self._pause), self._layouts[slot]
        shapes = page_shapes(self._model.groups, self.pool.dtype)
        pinned = self._device.type == "cuda"
        image = build_image(adapter, shapes, self.pool.dtype, pin_memory=pinned, pause=self._pause)
        if image.demand != layout.demand:
            raise RuntimeError(f"{digest} has other pages than on the first rank")
        self.pool.write(slot, image, self._pause)

    def _answer(self) -> None:
        for done in self._loader.finished():
            error = None if done.error is None else str(done.error) or repr(done.error)
            self._say(Written(int(done.tag), error))


def _captured(run: Callable[[], None], memory: Any) -> Callable[[], None]:
    """Capture a pass in a graph; returns what replays it. It must have run twice before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _silence(model: LoadedModel) -> None:
    """Let the model make no logits: those of the first rank alone are read."""
    head, embedded = model.head, {each.data_ptr() for each in model.embedding.parameters()}
    for tensor in (*head.parameters(), *head.buffers()):
        if tensor.data_ptr() not in embedded:
            tensor.data = tensor.data.new_empty(0)
    head.forward = lambda x: x.new_zeros((*x.shape[:-1], 1))  # its hooks see the input
