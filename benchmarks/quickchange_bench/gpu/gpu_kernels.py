"""Checks of every operation against its float64 reference, and times beside torch and the floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from quickchange_bench.gpu.gpu_cases import DeviceSetup, GpuCase

# ‖out - reference‖ / ‖reference‖
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_SPARE = 1 << 28  # elements of the buffers that the device's speed is measured on
_SQUARE = 8192


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Measured peak rates of the device."""

    bandwidth: float  # bytes a second, reading and writing
    arithmetic: float  # operations a second, in a large product

    def floor(self, case: GpuCase) -> float:
        """Least seconds of the case."""
        return max(case.bytes / self.bandwidth, case.operations / self.arithmetic)


@dataclass(frozen=True, slots=True)
class Checked:
    name: str
    dtype: str
    error: float  # relative; of a version that failed to run: infinite
    passed: bool
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """Median times in seconds."""

    name: str
    seconds: float
    rival: str
    rival_seconds: float
    floor: float


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(case: GpuCase, dtype: torch.dtype) -> Checked:
    """Run the case once on fresh data."""
    name = str(dtype).removeprefix("torch.")
    try:
        out, expected = case.outputs()
        expected = expected.double()
        norm = expected.norm().clamp_min(1e-30)
        error = float((out.double() - expected).norm() / norm)
    except Exception as failed:  # a kernel that does not compile must not hide the others' results
        return Checked(case.name, name, float("inf"), False, f"{type(failed).__name__}: {failed}")
    return Checked(case.name, name, error, error < TOLERANCE[dtype])


def check_all(
    device: torch.device,
    cases: Callable[[DeviceSetup], Iterable[GpuCase]],
    left: Callable[[], float],
) -> Iterator[Checked]:
    """Check every case in every precision, as long as there are seconds `left`."""
    for dtype in TOLERANCE:
        for case in cases(DeviceSetup(device, dtype, generator())):
            if left() > 0:
                yield check(case, dtype)


def time_all(
    device: torch.device,
    cases: Callable[[DeviceSetup], Iterable[GpuCase]],
    speed: DeviceSpeed,
    left: Callable[[], float],
) -> Iterator[Timed | Checked]:
    """Time every case in bfloat16, as long as there are seconds `left`. A wrong one is not timed:
    its check is returned instead."""
    for case in cases(DeviceSetup(device, torch.bfloat16, generator())):
        if left() <= 0:
            return
        checked = check(case, torch.bfloat16)
        if not checked.passed:
            yield checked
            continue
        yield Timed(
            case.name,
            seconds(case.run, device),
            case.rival,
            seconds(case.rival_run, device),
            speed.floor(case),
        )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, with the device's caches emptied before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=60, return_mode="median")) / 1e3
    run()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_speed(device: torch.device) -> DeviceSpeed:
    """Measure peak rates by one large copy and one large product in bfloat16."""
    small = device.type != "cuda"
    source = torch.ones(_SPARE >> (6 if small else 0), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    size = 256 if small else _SQUARE
    square = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    copied = seconds(lambda: target.copy_(source), device)
    multiplied = seconds(lambda: square @ square, device)
    return DeviceSpeed(2 * source.nbytes / copied, 2 * size**3 / multiplied)
