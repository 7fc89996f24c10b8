"""Checks and measurements on a GPU in one run: `python -m quickchange_bench.gpu.gpu_run`.

Takes minutes. Checks every operation, times it beside torch and its floor, runs the engine with
CUDA graphs. Needs torch, triton, transformers, safetensors, pydantic-settings and cachetools, and
no network. `--dry-run` goes the same way on a CPU with tiny sizes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from quickchange_bench.gpu.gpu_cases import llama_cases, small_cases
from quickchange_bench.gpu.gpu_engine import Decoded, decode_steps, suitable_shape
from quickchange_bench.gpu.gpu_kernels import (
    Checked,
    DeviceSpeed,
    Timed,
    check_all,
    measure_speed,
    time_all,
)

# Shares of the time after which a part stops where it is
CHECKS_END, TIMES_END = 0.3, 0.6


@dataclass
class GpuReport:
    """Findings so far; written after each part, so that a run cut short leaves some."""

    device: str
    torch: str
    dry_run: bool
    model: str
    speed: DeviceSpeed
    checks: list[Checked] = field(default_factory=list)
    times: list[Timed] = field(default_factory=list)
    engine: list[Decoded] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def failures(self) -> list[Checked]:
        return [checked for checked in self.checks if not checked.passed]


def run(device: torch.device, folder: Path, minutes: float) -> GpuReport:
    """Run all parts within the time; prints each as it is done."""
    started = time.monotonic()

    def left(share: float) -> Callable[[], float]:
        return lambda: started + 60 * minutes * share - time.monotonic()

    dry_run = device.type != "cuda"
    name = "CPU" if dry_run else torch.cuda.get_device_name(device)
    shape = suitable_shape(device)
    report = GpuReport(name, torch.__version__, dry_run, shape, measure_speed(device))
    print(f"{name}, torch {torch.__version__}: {report.speed.bandwidth / 1e9:.0f} GB/s, "
          f"{report.speed.arithmetic / 1e12:.1f} TFLOP/s\n")  # fmt: skip
    for checked in check_all(device, small_cases, left(CHECKS_END)):
        report.checks.append(checked)
    passed = len(report.checks) - len(report.failures)
    print(
        "\n".join(
            [f"{passed} of {len(report.checks)} checks passed", *map(_failed_line, report.failures)]
        )
    )
    report.write(folder)
    cases = small_cases if dry_run else llama_cases
    print("\n| operation | us | rival | us | floor us | over floor |\n|---|---|---|---|---|---|")
    for timed in time_all(device, cases, report.speed, left(TIMES_END)):
        if isinstance(timed, Timed):
            report.times.append(timed)
            print(_timed_line(timed), flush=True)
        else:
            report.checks.append(timed)
            print(_failed_line(timed), flush=True)
    report.write(folder)
    print(f"\n{shape}, decode\n\n| rows | adapters | graphs | ms a step | tokens/s | floor ms | "
          "ready after s |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for decoded in decode_steps(shape, device, report.speed.bandwidth, left(1.0)):
        report.engine.append(decoded)
        print(_decoded_line(decoded), flush=True)
    report.write(folder)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    return report


def _failed_line(bad: Checked) -> str:
    return f"FAILED {bad.name}, {bad.dtype}: {bad.failure or f'relative error {bad.error:.1e}'}"


def _timed_line(timed: Timed) -> str:
    return (
        f"| {timed.name} | {timed.seconds * 1e6:.1f} | {timed.rival} | "
        f"{timed.rival_seconds * 1e6:.1f} | {timed.floor * 1e6:.1f} | "
        f"{timed.seconds / timed.floor:.2f} |"
    )


def _decoded_line(decoded: Decoded) -> str:
    load = decoded.load
    return (
        f"| {load.rows} | {load.adapters} | {'yes' if decoded.graphs else 'no'} | "
        f"{decoded.seconds * 1e3:.2f} | {decoded.tokens_per_second:.0f} | "
        f"{decoded.floor * 1e3:.2f} | {decoded.ready_seconds:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=5.0, help="parts stop in time for this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device that this torch can use; --dry-run tries the path on the CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    report = run(device, options.out, options.minutes)
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
