"""The measured rates are of this machine: its instruction sets, its cores, its quota."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quickchange_kernels import native
from quickchange_kernels.roofline.cpu_machine import core_allowance, measure_cpu
from quickchange_kernels.roofline.machine import OPERANDS, CoreAllowance


@pytest.fixture
def ops() -> Iterator[object]:
    assert native.ensure()
    yield torch.ops.quickchange_native
    torch.ops.quickchange_native.use_instruction_set("best")


def test_each_instruction_set_multiplies_what_it_has_instructions_for(ops: object) -> None:
    best = ops.instruction_set()  # type: ignore[attr-defined]
    known = {
        "avx512_bf16": OPERANDS,
        "avx512": ("float32", "int8"),
        "avx2": ("float32", "int8"),
        "baseline": ("float32",),
    }
    for name in list(known)[list(known).index(best) :]:
        ops.use_instruction_set(name)  # type: ignore[attr-defined]
        rates = {kind: ops.multiply_adds(kind, 100_000) for kind in OPERANDS}  # type: ignore[attr-defined]
        assert tuple(kind for kind, rate in rates.items() if rate) == known[name]
        assert all(rate == 0 or 1e8 < rate < 1e14 for rate in rates.values())


def test_only_bytes_are_read(ops: object) -> None:
    with pytest.raises(ValueError, match="uint8"):
        ops.read_memory(torch.zeros(64))  # type: ignore[attr-defined]


def test_a_measurement_leaves_torchs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    rates = measure_cpu("this machine", threads=before + 1)
    assert (torch.get_num_threads(), rates.threads) == (before, before + 1)
    assert rates.bandwidth > 1e8
    assert 0 < rates.share < 1
    assert 0 < rates.wake < 1


def test_operands_without_instructions_of_their_own_multiply_as_float32() -> None:
    assert native.ensure()
    torch.ops.quickchange_native.use_instruction_set("baseline")
    try:
        rates = measure_cpu("this machine", threads=1)
    finally:
        torch.ops.quickchange_native.use_instruction_set("best")
    assert len(set(rates.operations.values())) == 1
    assert [rates.native(kind) for kind in OPERANDS] == [True, False, False]


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        (
            {"cpu.max": "300000 100000", "a/cpu.max": "max 100000", "a/b/cpu.max": "50000 100000"},
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
    ],
)
def test_the_quota_is_the_least_of_the_control_group_and_those_above(
    tmp_path: Path, quotas: dict[str, str], expected: float | None
) -> None:
    groups, membership = tmp_path / "groups", tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    for name, text in quotas.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text + "\n")
    found = core_allowance(groups, membership)
    assert found == CoreAllowance(len(os.sched_getaffinity(0)), expected)


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"), [(4, None, 4), (4, 1.5, 2), (2, 8.0, 2), (4, 0.5, 1)]
)
def test_usable_cores_are_the_affinity_within_the_quota(
    affinity: int, quota: float | None, usable: int
) -> None:
    assert CoreAllowance(affinity, quota).usable == usable
