"""This machine's rates, measured: reading, multiplying, sharing an operation out.

The loops are native (`csrc/peak_rates.h`), run on as many threads as there are cores to use. Each
figure is the median of several windows; nothing else should run meanwhile.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from quickchange_kernels import native
from quickchange_kernels.roofline.machine import OPERANDS, CoreAllowance, CpuRates

READ_BYTES = 2**29  # more than any cache holds
WINDOWS = 15
ROUNDS = 2_000_000  # of a loop of products: 5 to 30 ms
SHARED = 2_000  # operations on end
PAUSE = 0.02  # s, after which threads sleep


def core_allowance(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> CoreAllowance:
    """The process's affinity and the least quota of its control group and those above."""
    quotas = list(_quotas(groups, membership))
    return CoreAllowance(len(os.sched_getaffinity(0)), min(quotas, default=None))


def _quotas(groups: Path, membership: Path) -> Iterator[float]:
    """Cores of each quota: cgroup 2's `cpu.max` from the process's group up, or cgroup 1's."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    joint = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    own = groups / (joint[0] if joint else "")
    for folder in (own, *own.parents):
        if folder.is_relative_to(groups) and (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
    file = groups / "cpu" / "cpu.cfs_quota_us"
    if file.exists() and (quota_us := int(file.read_text())) > 0:
        yield quota_us / int(file.with_name("cpu.cfs_period_us").read_text())


def read_bandwidth() -> float:
    """Bytes a second that all of torch's threads read from memory.

    Raises:
        RuntimeError: the native kernels can't be built.
    """
    _need_native()
    data = torch.ones(READ_BYTES, dtype=torch.uint8)  # written: untouched pages would all be one
    return _median(lambda: float(torch.ops.quickchange_native.read_memory(data)))


def measure_cpu(name: str, threads: int | None = None) -> CpuRates:
    """Measure this machine on `threads` threads (default: the usable cores), in about two seconds.

    Raises:
        RuntimeError: the native kernels can't be built.
    """
    _need_native()
    ops = torch.ops.quickchange_native
    allowance = core_allowance()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or allowance.usable)
    try:
        rates = {kind: 2 * _median(partial(ops.multiply_adds, kind, ROUNDS)) for kind in OPERANDS}
        return CpuRates(
            name=name,
            bandwidth=read_bandwidth(),
            operations={kind: rate or rates["float32"] for kind, rate in rates.items()},
            instruction_set=ops.instruction_set(),
            allowance=allowance,
            threads=torch.get_num_threads(),
            share=_median(lambda: float(ops.share_cost(SHARED))),
            wake=_median(_after_pause),
        )
    finally:
        torch.set_num_threads(before)


def _need_native() -> None:
    if not native.ensure():
        raise RuntimeError("measuring the machine needs the native kernels; see the warning above")


def _median(window: Callable[[], float]) -> float:
    window()  # the first meets cold caches and threads asleep
    return statistics.median(window() for _ in range(WINDOWS))


def _after_pause() -> float:
    time.sleep(PAUSE)
    return float(torch.ops.quickchange_native.share_cost(1))
