"""Limits of workloads are what the arithmetic by hand gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quickchange_kernels.roofline.machine import MachineRates, Model
from quickchange_kernels.roofline.workload_limits import (
    PRECISIONS,
    ClosedLoop,
    prompt_work,
    step_work,
    workload_limit,
)

SMOLLM2 = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152)
FLOAT32 = PRECISIONS["float32"]
# two cores with 16 multiply-adds a cycle at 3.7 GHz, and the memory of the same machine
TWO_CORES = MachineRates("two cores", 40.5e9, {"float32": 237e9, "bfloat16": 474e9, "int8": 948e9})
FULL = ClosedLoop(concurrent=16, prompt=64, answer=64, adapters=16)


def test_a_step_of_16_rows_under_16_adapters_reads_851_mb_in_21_ms_and_multiplies_for_19() -> None:
    base, rest = step_work(SMOLLM2, FLOAT32, FULL.batch, context=0)
    moved = base.bytes + rest.bytes
    assert moved == pytest.approx(851e6, rel=2e-3)
    assert moved / TWO_CORES.bandwidth == pytest.approx(21e-3, rel=2e-2)
    operations = base.operations + rest.operations
    assert operations / TWO_CORES.operations["float32"] == pytest.approx(19e-3, rel=2e-2)


def test_weights_are_read_once_a_step_and_an_adapter_once_where_rows_share_it() -> None:
    none, _ = step_work(SMOLLM2, FLOAT32, replace(FULL, adapters=0).batch, context=0)
    assert none.bytes == pytest.approx(538e6, rel=1e-3)
    one, eight, sixteen = (
        step_work(SMOLLM2, FLOAT32, replace(FULL, adapters=n).batch, context=0)[1].bytes
        for n in (1, 8, 16)
    )
    assert one == pytest.approx(19.5e6, rel=1e-2)
    assert (eight, sixteen) == (8 * one, 16 * one)


def test_keys_and_values_are_read_by_every_row() -> None:
    near, far = (step_work(SMOLLM2, FLOAT32, FULL.batch, context=n)[1].bytes for n in (0, 100))
    assert far - near == 16 * 100 * 30 * 2 * 3 * 64 * 4


def test_a_token_of_a_prompt_costs_a_fifth_of_a_gigaflop() -> None:
    base, rest = prompt_work(SMOLLM2, FLOAT32, tokens=64, rank=0)
    assert (base.operations + rest.operations) / 64 == pytest.approx(0.21e9, rel=3e-2)
    assert base.bytes == rest.bytes == 0


@pytest.mark.parametrize("bandwidth", [36e9, 38e9])
def test_a_closed_loop_of_64_tokens_in_and_out_at_16_can_reach_about_390_tokens_a_second(
    bandwidth: float,
) -> None:
    found = workload_limit(replace(TWO_CORES, bandwidth=bandwidth), SMOLLM2, FLOAT32, FULL)
    assert found.tokens_per_second == pytest.approx(390, rel=6e-2)


def test_a_step_takes_the_longer_of_reading_and_multiplying() -> None:
    slow_memory = replace(TWO_CORES, bandwidth=1e9)
    slow_units = replace(TWO_CORES, operations={"float32": 1e9})
    for machine, longer in ((slow_memory, "step_reading"), (slow_units, "step_arithmetic")):
        found = workload_limit(machine, SMOLLM2, FLOAT32, FULL)
        step = getattr(found, longer)
        assert step == max(found.step_reading, found.step_arithmetic)
        seconds = 63 * step + 16 * found.prompt_arithmetic
        assert found.tokens_per_second == pytest.approx(1024 / seconds)


def test_narrow_weights_cost_their_bits_and_their_scales() -> None:
    widths = {}
    for name, precision in PRECISIONS.items():
        base, _ = step_work(SMOLLM2, precision, replace(FULL, adapters=0).batch, context=0)
        widths[name] = base.bytes / (134_479_872 / 8)  # bits a weight
    head = 49152 * 576 / 134_479_872  # which int4 keeps in 8.5 bits too
    int4 = pytest.approx(5 * (1 - head) + 8.5 * head)
    assert widths == {"float32": 32, "bfloat16": 16, "int8": 8.5, "int4": int4}


def test_narrow_operands_multiply_at_their_own_rate() -> None:
    wide, narrow = (
        workload_limit(TWO_CORES, SMOLLM2, PRECISIONS[name], replace(FULL, adapters=0))
        for name in ("float32", "bfloat16")
    )
    assert narrow.step_arithmetic == pytest.approx(wide.step_arithmetic / 2)
    assert narrow.prompt_arithmetic == pytest.approx(wide.prompt_arithmetic / 2)
