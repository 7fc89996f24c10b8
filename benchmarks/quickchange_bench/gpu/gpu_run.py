"""Checks and measurements on a GPU in one run: `python -m quickchange_bench.gpu.gpu_run`.

Parts run one after the other while there is time; each part's result is printed and written when it
is there, and stays whatever becomes of the next. Needs torch, triton, transformers, safetensors,
pydantic-settings and cachetools, and no network. `--dry-run` goes the same way on a CPU with tiny
sizes, the engine on a GPU that is not there; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quickchange_bench.gpu.gpu_cases import DeviceSetup, GpuCase, llama_cases, small_cases
from quickchange_bench.gpu.gpu_engine import BenchEngine, EngineScale, model_of, suitable_scale
from quickchange_bench.gpu.gpu_kernels import check_all, measure_speed, time_all

# Share of the time after which a part begins nothing more
_ENDS = {"kernels": 0.25, "start": 1.0, "loads": 0.75, "prefill": 0.8, "turbo": 0.9}


@dataclass
class GpuRun:
    """Findings by part; written after each, so that a run cut short leaves some."""

    device: torch.device
    folder: Path
    minutes: float
    scale: EngineScale
    started: float = field(default_factory=time.monotonic)
    found: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # by part
    engine: BenchEngine | None = None
    opened: ExitStack = field(default_factory=ExitStack)  # ends with the engine's parts

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"

    def left(self, part: str) -> Callable[[], float]:
        """Seconds until a part is to begin nothing more."""
        share = _ENDS.get(part, 1.0)
        return lambda: self.started + 60 * self.minutes * share - time.monotonic()

    def part(self, name: str, run: Callable[[GpuRun], Iterator[Any]]) -> None:
        """Run one part; an error ends it, not the others."""
        print(f"\n== {name}, after {time.monotonic() - self.started:.0f} s", flush=True)
        results = self.found[name] = []
        try:
            for result in run(self):
                results.append(result)
                print(_line(result), flush=True)
        except Exception as error:  # whatever fails on a new machine must not cost the other parts
            self.failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.write()

    def started_engine(self) -> BenchEngine:
        if self.engine is None:
            raise RuntimeError("the engine did not start")
        return self.engine

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "CPU" if self.dry else torch.cuda.get_device_name(self.device)
        report = {
            "device": name,
            "torch": torch.__version__,
            "dry_run": self.dry,
            "scale": asdict(self.scale),
            "parts": self.found,
            "failures": self.failures,
        }
        text = json.dumps(report, indent=1, default=asdict)
        (self.folder / "gpu.json").write_text(text + "\n")


def kernels(run: GpuRun) -> Iterator[Any]:
    """Every kernel against float64."""
    checks = []
    for checked in check_all(run.device, small_cases, run.left("kernels")):
        checks.append(checked)
        if not checked.passed:
            yield checked
    wrong = sum(not checked.passed for checked in checks)
    yield {"checks": len(checks), "wrong": wrong}
    if wrong:
        raise ArithmeticError(f"{wrong} of {len(checks)} kernels are wrong")


def start(run: GpuRun) -> Iterator[Any]:
    """A real start: model, caches, captures; what it took."""
    began = time.monotonic()
    model = model_of(run.scale, run.device)
    loaded = time.monotonic()
    run.opened.enter_context(_device(run.device))
    run.engine = BenchEngine(model, run.scale, run.device)
    run.opened.callback(run.engine.close)
    yield {"model_seconds": loaded - began, "engine_seconds": time.monotonic() - loaded}
    yield asdict(run.engine.engine.ready(time.monotonic() - began)) | {"prices": None}
    if not run.dry:
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        yield {"held_bytes": held, "peak_bytes": peak, "free_bytes": torch.cuda.mem_get_info()[0]}


def loads(run: GpuRun) -> Iterator[Any]:
    """Each number of requests under each number of distinct adapters."""
    for requests in run.scale.requests:
        for adapters in run.scale.adapters:
            if adapters <= requests and run.left("loads")() > 0:
                yield run.started_engine().serve(requests, adapters)


def prefill(run: GpuRun) -> Iterator[Any]:
    """Long prompts alone."""
    yield {"prompt_tokens_per_second": run.started_engine().prefill(4)}


def turbo(run: GpuRun) -> Iterator[Any]:
    """Drafts off and on, by lookup and by heads; random weights accept what they happen to."""
    for drafting in ("none", "lookup", "heads"):
        if run.left("turbo")() > 0:
            yield run.started_engine().serve(run.scale.requests[0], 0, drafting)


def attention(run: GpuRun) -> Iterator[Any]:
    """Attention of a model's shapes, by whichever version serves it."""
    yield from _timed(run, "attention", only="attention")


def timings(run: GpuRun) -> Iterator[Any]:
    """Kernels beside torch and their floors, in the time that is left."""
    yield from _timed(run, "timings")


def _timed(run: GpuRun, part: str, only: str = "") -> Iterator[Any]:
    """Times of the cases whose names begin with `only`."""
    speed = measure_speed(run.device)
    yield speed
    cases = small_cases if run.dry else llama_cases

    def some(bench: DeviceSetup) -> Iterator[GpuCase]:
        return (case for case in cases(bench) if case.name.startswith(only))

    yield from time_all(run.device, some, speed, run.left(part))


def run_all(device: torch.device, folder: Path, minutes: float) -> GpuRun:
    """Run all parts within the time."""
    run = GpuRun(device, folder, minutes, suitable_scale(device))
    run.part("kernels", kernels)
    with run.opened:
        for engine_part in (start, loads, prefill, turbo):
            run.part(engine_part.__name__, engine_part)
    run.engine = None
    run.part("attention", attention)
    run.part("timings", timings)
    print(f"\n{time.monotonic() - run.started:.0f} s in all; failed: {run.failures or 'nothing'}")
    return run


def _device(device: torch.device) -> AbstractContextManager[object]:
    """What the engine's parts run on: in a dry run a GPU that is not there, and no compiler."""
    if device.type == "cuda":
        return nullcontext()
    from quickchange_kernels.absent_gpu import absent_gpu
    from quickchange_kernels.gpu_targets import TARGETS

    return absent_gpu(TARGETS["sm_90"], on_key=lambda _: None, products=False)


def _line(result: Any) -> str:
    """A result on one line."""
    if isinstance(result, str):
        return result
    values = result if isinstance(result, dict) else asdict(result)
    shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=7.0, help="parts stop in time for this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device that this torch can use; --dry-run tries the path on the CPU")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    device = torch.device("cpu" if options.dry_run else "cuda")
    sys.exit(1 if run_all(device, options.out, options.minutes).failures else 0)


if __name__ == "__main__":
    main()
