"""The PTX executor computes what a GPU would, and refuses what a GPU would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ptx_executor
import ptx_specimens as specimens
from ptx_launches import compiled_launch, launches_run_as_ptx
from ptx_memory import FaultError
from ptx_parser import parse, split_operands


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    ("dtype", "K", "N"),
    [(torch.bfloat16, 64, 32), (torch.float16, 80, 40), (torch.bfloat16, 37, 19)],
)
def test_a_pipelined_product_is_right(dtype: torch.dtype, K: int, N: int, seed: int | None) -> None:
    x, w = randn(16, K, dtype=dtype), randn(N, K, dtype=dtype)
    out = torch.full((16, N), float("nan"))
    with launches_run_as_ptx(seed):
        specimens.linear[(2,)](x, w, out, K, N, 16, 32, 32, num_warps=2, num_stages=3)
    torch.testing.assert_close(out, (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5)


def test_float32_products_keep_ten_bits() -> None:
    x, w = randn(16, 32), randn(32, 32)
    out = torch.empty(16, 32)
    with launches_run_as_ptx():
        specimens.linear[(1,)](x, w, out, 32, 32, 16, 32, 32, num_warps=2, num_stages=1)
    error = (out.double() - x.double() @ w.double().T).norm() / out.double().norm()
    assert 1e-5 < error < 2e-3  # as tensor cores have it in tf32, which the compiler chose


@pytest.mark.parametrize("N", [1, 100, 256])
def test_reductions_across_warps_are_right(N: int) -> None:
    x = randn(3, N, dtype=torch.bfloat16)
    out = torch.empty(3, N)
    with launches_run_as_ptx():
        specimens.softmax[(3,)](x, out, N, 256, num_warps=4)
    torch.testing.assert_close(out, x.float().softmax(-1), rtol=1e-5, atol=1e-6)


def test_integers_divide_toward_zero_and_shift_their_sign() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1000, 1000, (128,), dtype=torch.int32, generator=generator)
    y = torch.randint(1, 50, (128,), dtype=torch.int32, generator=generator)
    y[::2] *= -1
    out = torch.empty_like(x)
    with launches_run_as_ptx():
        specimens.divided[(1,)](x, y, out, 128)
    quotient = torch.div(x, y, rounding_mode="trunc")
    expected = quotient * 1000 + (x - quotient * y) + (x >> 3) + (x.long() * y >> 2).int()
    assert torch.equal(out, expected)


def test_atomics_add_up() -> None:
    x = randn(512)
    out = torch.zeros(1, dtype=torch.int32)
    with launches_run_as_ptx():
        specimens.counted[(4,)](x, out, 128)
    assert out.item() == (x > 0).sum()


def test_a_false_promise_of_alignment_faults() -> None:
    x, out = randn(256), torch.empty(128)
    with launches_run_as_ptx():
        specimens.shifted[(1,)](x, out, 8, 128, num_warps=1)
        assert torch.equal(out, x[8:136])
        with pytest.raises(FaultError, match="misaligned"):
            specimens.shifted[(1,)](x, out, 6, 128, num_warps=1)


def test_an_access_outside_every_tensor_faults() -> None:
    with launches_run_as_ptx(), pytest.raises(FaultError, match="outside every tensor"):
        specimens.shifted[(1,)](randn(64), torch.empty(128), 8, 128, num_warps=1)


def run_edited(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], gone: str) -> None:
    """Launch a kernel, with random order of warps, without the PTX lines that hold `gone`."""
    compiled, values, _ = compiled_launch(kernel, arguments, options, (1,))
    kept = [line for line in compiled.asm["ptx"].splitlines() if gone not in line]
    assert len(kept) < len(compiled.asm["ptx"].splitlines())
    ptx_executor.launch("\n".join(kept), compiled.metadata.shared, (1,), values, seed=2)


def test_a_missing_barrier_shows() -> None:
    x, out = randn(256), torch.zeros(256)
    with launches_run_as_ptx(seed=2):
        specimens.reversed_within[(1,)](x, out, 256, num_warps=4)
    assert torch.equal(out, x.flip(0))
    run_edited(specimens.reversed_within, (x, out, 256), {"num_warps": 4}, "bar.sync")
    assert not torch.equal(out, x.flip(0))


def test_a_missing_wait_for_copies_shows() -> None:
    x, w = randn(16, 64, dtype=torch.bfloat16), randn(32, 64, dtype=torch.bfloat16)
    out = torch.zeros(16, 32)
    options = {"num_warps": 2, "num_stages": 3}
    arguments = (x, w, out, 64, 32, 16, 32, 32)
    run_edited(specimens.linear, arguments, options, "cp.async.wait_group")
    assert out.isnan().any()


def test_an_unknown_instruction_is_named() -> None:
    ptx = """
.version 8.4
.target sm_80
.visible .entry tiny()
.reqntid 32
{
	wgmma.fence.sync.aligned;
	ret;
}
"""
    with pytest.raises(FaultError, match=r"doesn't know wgmma\.fence"):
        ptx_executor.launch(ptx, 0, (1,), [])


def test_the_parser_reads_predicates_labels_and_vectors() -> None:
    program = parse("""
.visible .entry small(
	.param .u64 small_param_0,
	.param .u32 small_param_1
)
.reqntid 64
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<2>;
	.loc	1 2 3
$L__BB0_1:
	@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];   // comment
	bra.uni 	$L__BB0_1;
}
""")
    load, jump = program.instructions
    assert (load.predicate, load.negated, load.type) == ("p1", True, "b32")
    assert load.operands == ("{ %r1, %r2 }", "[ %rd1 + 16 ]")
    assert jump.operands == ("$L__BB0_1",)
    assert program.labels == {"$L__BB0_1": 0}
    assert program.widths == {"p": 1, "r": 32, "rd": 64}
    assert program.parameters == ("small_param_0", "small_param_1")
    assert program.threads == 64


def test_operands_split_outside_brackets() -> None:
    assert split_operands("{a, b}, [c+1], d") == ("{a, b}", "[c+1]", "d")
