"""This process's place among those that hold a model together, and what they do jointly.

Every rank makes the same calls in the same order. All are on one machine and meet on a port of its
loopback address, which the first rank has opened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from quickchange_server.config import Settings

LOOPBACK = "127.0.0.1"
_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, from 0, and the number of all."""

    rank: int
    size: int

    def sum_(self, x: Tensor) -> None:
        """Replace x, contiguous and of one shape on all ranks, by the sum over them."""
        dist.all_reduce(x)

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in order; x is of one shape on all of them."""
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(every, x)
        return every

    def share(self, x: Tensor) -> None:
        """Replace x, of one shape on all ranks, by the first rank's."""
        dist.broadcast(x, 0)

    def agree(self, told: Hashable) -> bool:
        """True if all ranks tell the same."""
        every: list[Hashable] = [None] * self.size
        dist.all_gather_object(every, told)
        return all(other == told for other in every)

    def leave(self) -> None:
        """Give the connections to the others up."""
        dist.destroy_process_group()


def device_of(rank: int, settings: Settings) -> torch.device:
    """A rank's own device."""
    return torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", rank)


def join(rank: int, settings: Settings, port: int, listening: int | None = None) -> Ranks:
    """Meet the other ranks. listening: the file descriptor of the port's socket, on the first rank.

    No joint step may take longer than a start may. On a CPU the ranks share its threads.
    """
    device, size = device_of(rank, settings), settings.tensor_parallel
    os.environ["LOCAL_RANK"] = str(rank)  # where transformers looks for the rank's device
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes a GPU where it sees one
        torch.set_num_threads(settings.threads or max(1, torch.get_num_threads() // size))
    else:
        torch.cuda.set_device(device)
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", _INTERFACE)
    patience = timedelta(seconds=settings.engine_start_seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK,
        port,
        is_master=listening is not None,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=patience,
        device_id=None if device.type == "cpu" else device,
    )
    return Ranks(rank, size)
