"""The floors are the arithmetic that they claim, and the document shows what is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from quickchange_kernels.roofline import floors, roofline_tables
from quickchange_kernels.roofline.floors import KernelWork, StepBatch
from quickchange_kernels.roofline.machine import H100, LLAMA_8B, LLAMA_70B, Linear, Model

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
SMALL = Linear("small", 8, (4, 2))


def test_floors_of_a_small_call_are_those_worked_by_hand() -> None:
    batch = StepBatch(rows=3, adapters=2, rank=1)
    # A: 2 adapters x 2 linears x rank 1 x 8 inputs; 3 rows of 8 inputs and of 2 float32 sums
    assert floors.shrink(SMALL, batch) == KernelWork(2 * 32 + 3 * (2 * 8 + 4 * 2), 2 * 3 * 2 * 8)
    # B: 2 adapters x rank 1 x 6 outputs; 3 rows of 6 outputs twice, and of 2 float32 sums
    assert floors.expand(SMALL, batch) == KernelWork(2 * 12 + 3 * (2 * 2 * 6 + 4 * 2), 2 * 3 * 6)
    assert floors.linear(SMALL, 3) == KernelWork(2 * (48 + 3 * 14), 2 * 3 * 48)


@pytest.mark.parametrize(("model", "parameters"), [(LLAMA_8B, 8.03e9), (LLAMA_70B, 70.55e9)])
def test_the_models_have_the_parameters_that_they_are_known_for(
    model: Model, parameters: float
) -> None:
    layer = sum(group.inputs * sum(group.outputs) for group in model.linears)
    total = model.layers * layer + 2 * model.vocabulary * model.hidden
    assert total == pytest.approx(parameters, rel=1e-3)


def test_a_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    assert KernelWork(3.35e12, 1).seconds(H100) == 1
    assert KernelWork(1, 2 * 989e12).seconds(H100) == 2


def test_reading_keys_and_values_bounds_attention() -> None:
    work = floors.attention(LLAMA_8B, rows=16, context=1024)
    keys_and_values = 16 * 1024 * 2 * 8 * 128 * 2
    assert keys_and_values < work.bytes < 1.01 * keys_and_values
    assert work.seconds(H100) == work.bytes / H100.bandwidth


def test_the_document_shows_the_floors_as_computed() -> None:
    document = DOCUMENT.read_text()
    assert roofline_tables.written(document, roofline_tables.FLOORS) == document, (
        "run python -m quickchange_kernels.roofline --write docs/kernels.md"
    )


@pytest.mark.slow
def test_the_document_shows_the_compiled_kernels_as_they_are() -> None:
    pytest.importorskip("triton")
    document = DOCUMENT.read_text()
    assert roofline_tables.written(document, roofline_tables.COMPILED) == document, (
        "run python -m quickchange_kernels.roofline --write docs/kernels.md"
    )


def test_a_document_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place '<!-- table step -->'"):
        roofline_tables.written("# Empty", ["step"])


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDG.E.128 R4, [R8.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R8.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R5, R4 ;
        /*0060*/              @P0 BRA `(.L_x_2) ;
        /*0070*/                   EXIT ;
"""


def test_the_hot_loop_is_the_one_with_the_widest_loads() -> None:
    pytest.importorskip("triton")
    from quickchange_kernels.roofline.compiled import Loop, hot_loop

    assert hot_loop(SASS) == Loop(instructions=4, bytes_loaded=2 * 16 * 32)
    assert hot_loop("  /*0000*/  EXIT ;") == Loop(instructions=1, bytes_loaded=0)
