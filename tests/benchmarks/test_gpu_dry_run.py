"""What runs on a GPU goes the same way on a CPU with tiny sizes, the engine on an absent GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quickchange_bench.gpu import gpu_run
from quickchange_bench.gpu.gpu_cases import DeviceSetup, small_cases
from quickchange_bench.gpu.gpu_engine import DRY, gaps_between
from quickchange_bench.gpu.gpu_kernels import Timed, check, generator
from quickchange_bench.gpu.gpu_run import GpuRun, run_all

CPU = torch.device("cpu")
PARTS = ["kernels", "start", "loads", "prefill", "turbo", "attention", "timings"]


def test_a_dry_run_goes_through_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "suitable_scale", lambda _: dataclasses.replace(DRY, seconds=0.05))
    run = run_all(CPU, tmp_path, minutes=8)
    assert run.failures == {}
    assert list(run.found) == PARTS
    served = [one for part in ("loads", "turbo") for one in run.found[part]]
    assert [(one.requests, one.adapters) for one in served] == [
        *((1, 0), (1, 1), (4, 0), (4, 1), (4, 4)),
        *((1, 0), (1, 0), (1, 0)),
    ]
    assert all(one.tokens_per_second > 0 and one.host_ms > 0 for one in served)
    timed = [one for one in run.found["timings"] if isinstance(one, Timed)]
    assert len(timed) == len(list(small_cases(DeviceSetup(CPU, torch.float32, generator()))))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["dry_run"] is True
    assert list(written["parts"]) == PARTS
    assert written["parts"]["loads"][0]["late_captures"] == 0


def test_a_part_that_fails_leaves_the_others_and_what_it_had_found(tmp_path: Path) -> None:
    run = GpuRun(CPU, tmp_path, 8, DRY)

    def breaks(_: GpuRun) -> Iterator[str]:
        yield "half"
        raise RuntimeError("no kernel image")

    run.part("first", breaks)
    run.part("second", lambda _: iter(["whole"]))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"] == {"first": ["half"], "second": ["whole"]}
    assert written["failures"] == {"first": "RuntimeError: no kernel image"}


def test_no_time_left_begins_nothing(tmp_path: Path) -> None:
    run = GpuRun(CPU, tmp_path, 0, DRY)
    run.part("kernels", gpu_run.kernels)
    run.part("loads", gpu_run.loads)
    assert run.found == {"kernels": [{"checks": 0, "wrong": 0}], "loads": []}
    assert run.failures == {}


@pytest.mark.parametrize(
    ("spans", "idle", "longest"),
    [
        ([], None, None),
        ([(0, 10)], 0.0, 0.0),
        ([(20, 30), (0, 10)], 1 / 3, 0.01),  # in any order
        ([(0, 10), (5, 8), (10, 20), (40, 50)], 0.4, 0.02),  # overlapping ones count once
    ],
)
def test_the_devices_gaps_are_what_no_kernel_covers(
    spans: list[tuple[float, float]], idle: float | None, longest: float | None
) -> None:
    assert gaps_between(spans) == (
        (None, None) if idle is None else (pytest.approx(idle), pytest.approx(longest))
    )


@pytest.mark.parametrize("wrong", ["a bad result", "a version that does not run"])
def test_a_check_reports_what_is_wrong(wrong: str) -> None:
    case = next(iter(small_cases(DeviceSetup(CPU, torch.float32, generator()))))
    out, expected = case.outputs()

    def broken() -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "a bad result":
            return out * 1.01, expected
        raise RuntimeError("no kernel image")

    checked = check(dataclasses.replace(case, outputs=broken), torch.float32)
    assert not checked.passed
    assert (checked.failure is None) == (wrong == "a bad result")
