"""What runs on a GPU goes the same way on a CPU with tiny sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from quickchange_bench.gpu.gpu_cases import DeviceSetup, small_cases
from quickchange_bench.gpu.gpu_engine import LOADS
from quickchange_bench.gpu.gpu_kernels import check, generator
from quickchange_bench.gpu.gpu_run import run

CPU = torch.device("cpu")


def test_a_dry_run_checks_times_and_decodes_everything(tmp_path: Path) -> None:
    report = run(CPU, tmp_path, minutes=5)
    assert report.failures == []
    assert [decoded.load for decoded in report.engine] == LOADS
    assert all(timed.seconds > 0 and timed.floor > 0 for timed in report.times)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["dry_run"] is True
    assert len(written["times"]) == len(
        list(small_cases(DeviceSetup(CPU, torch.float32, generator())))
    )


def test_a_run_without_time_left_stops_and_still_writes(tmp_path: Path) -> None:
    report = run(CPU, tmp_path, minutes=0)
    assert (report.checks, report.times, report.engine) == ([], [], [])
    assert (tmp_path / "gpu.json").exists()


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
