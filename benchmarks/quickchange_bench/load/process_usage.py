"""CPU and memory of a server's processes and of the machine, by psutil and Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_bench.bench_results import ResourceUse

Process = Any  # psutil.Process: psutil comes with the extra "bench" and has no types


def require_psutil() -> Any:
    """The psutil module.

    Raises:
        RuntimeError: it is not installed; says how to.
    """
    try:
        import psutil
    except ImportError as error:
        raise RuntimeError(
            "measuring processes needs psutil: pip install 'quickchange[bench]'"
        ) from error
    return psutil


def tree(pid: int) -> list[Process]:
    """The process and all under it; empty once it is gone."""
    psutil = require_psutil()
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process in bytes. `peak_rss` and `pss` are Linux's; None elsewhere."""

    pid: int
    name: str
    rss: int
    pss: int | None
    peak_rss: int | None


def memory(pid: int) -> list[Memory]:
    """Memory of each process of the tree; those that end meanwhile are left out."""
    psutil = require_psutil()
    found = []
    for process in tree(pid):
        try:
            found.append(
                Memory(
                    pid=process.pid,
                    name=_describe(process),
                    rss=process.memory_info().rss,
                    pss=getattr(process.memory_full_info(), "pss", None),
                    peak_rss=_peak_rss(process.pid),
                )
            )
        except psutil.NoSuchProcess:
            continue
    return found


def _describe(process: Process) -> str:
    """The process's name, or its module where Python only names itself."""
    command = process.cmdline()
    if any("resource_tracker" in part for part in command):
        return "resource tracker"
    if any("multiprocessing" in part for part in command):
        return "engine"
    return str(process.name())


def _peak_rss(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _cpu_seconds(pid: int) -> float:
    psutil = require_psutil()
    seconds = 0.0
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def _machine_busy() -> float:
    """CPU seconds that anything on the machine has used."""
    times = require_psutil().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts guests' time in user's already
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guests)


class ResourceProbe:
    """Counter of resource use from its making to `stop()`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = time.perf_counter()
        self._before = self._reading()

    def _reading(self) -> tuple[float, float, float]:
        own = os.times()
        return _cpu_seconds(self._pid), own.user + own.system, _machine_busy()

    def stop(self) -> ResourceUse:
        seconds = time.perf_counter() - self._started
        server, client, busy = (
            after - before for after, before in zip(self._reading(), self._before, strict=True)
        )
        processes = memory(self._pid)
        return ResourceUse(
            server_cpu_seconds=server,
            server_cores=server / seconds,
            client_cores=client / seconds,
            other_cores=max(busy - server - client, 0.0) / seconds,
            peak_rss=_total(p.peak_rss for p in processes),
            pss=_total(p.pss for p in processes),
        )
