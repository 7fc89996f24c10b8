"""Processes that keep the cores busy beside a server, and the speed that is a server's due then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends with the process that started it, however that ends.
_LOOP = "import os, sys\nparent = int(sys.argv[1])\nwhile os.getppid() == parent: pass"


@contextmanager
def busy_neighbours(count: int) -> Iterator[tuple[int, ...]]:
    """Run `count` busy loops, pinned to no core, until the block ends. Their process ids."""
    command = [sys.executable, "-S", "-c", _LOOP, str(os.getpid())]
    loops = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield tuple(loop.pid for loop in loops)
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def fair_fraction(cores: int, threads: int, busy: int) -> float:
    """A server's due of its quiet speed: cores / (threads + busy), at most 1.

    Each thread that wants to run is due the same time. Two threads on two cores: 2/3 beside one
    busy process, 2/5 beside three.
    """
    return min(1.0, cores / (threads + busy))
