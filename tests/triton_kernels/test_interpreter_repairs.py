"""The repaired interpreter computes bfloat16 as torch does; the sanitizer catches planted bugs."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of the interpreter alone", allow_module_level=True)

import triton_sanitizer
from triton_sanitizer import FalseHintError, OutOfBoundsError, RaceError, sanitized


@triton.jit
def arithmetic(a, b, out, OPERATION: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x, y = tl.load(a + lanes), tl.load(b + lanes)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "sub":
        z = x - y
    elif OPERATION == "mul":
        z = x * y
    elif OPERATION == "less":
        z = (x < y).to(tl.bfloat16)
    elif OPERATION == "maximum":
        z = tl.maximum(x, y)
    else:
        z = -x
    tl.store(out + lanes, z)


@triton.jit
def cast(source, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(source + lanes).to(out.dtype.element_ty))


@triton.jit
def product(a, b, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = rows * N + columns
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def row_sums(a, out, N: tl.constexpr):
    rows, columns = tl.arange(0, N), tl.arange(0, N)
    block = tl.load(a + rows[:, None] * N + columns[None, :])
    tl.store(out + rows, tl.sum(block, axis=1))


@triton.jit
def fill(out, VALUE: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.full((N,), VALUE, tl.bfloat16))


EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "less": lambda x, y: (x < y).bfloat16(),
    "maximum": torch.maximum,
    "negate": lambda x, _: -x,
}


def random_bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).bfloat16()


@pytest.mark.parametrize("operation", EXPECTED)
def test_bfloat16_arithmetic_is_that_of_torch(operation: str) -> None:
    a, b = random_bfloat16(2, 256)
    out = torch.full_like(a, float("nan"))
    arithmetic[(1,)](a, b, out, operation, 256)
    assert torch.equal(out, EXPECTED[operation](a, b))


def test_float32_rounds_to_the_nearest_even_bfloat16() -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, -0x407F8000], dtype=torch.int32)
    special = torch.tensor([float("inf"), -float("inf"), 1e-40, -0.0])
    source = torch.cat([ties.view(torch.float32), special, torch.randn(248)])
    out = torch.empty(256, dtype=torch.bfloat16)
    cast[(1,)](source, out, 256)
    assert torch.equal(out.view(torch.int16), source.bfloat16().view(torch.int16))


def test_not_a_number_stays_one_in_bfloat16() -> None:
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    out = torch.zeros(4, dtype=torch.bfloat16)
    cast[(1,)](torch.cat([payloads, torch.ones(1)]), out, 4)
    assert out.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32])
def test_bfloat16_widens_to_its_value(target: torch.dtype) -> None:
    source = random_bfloat16(256) * 100
    out = torch.empty(256, dtype=target)
    cast[(1,)](source, out, 256)
    assert torch.equal(out, source.to(target))


def test_products_of_bfloat16_matrices_match_float64() -> None:
    a, b = random_bfloat16(2, 32, 32)
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_sums_of_bfloat16_round_once() -> None:
    a = random_bfloat16(64, 64)
    out = torch.empty(64, dtype=torch.bfloat16)
    row_sums[(1,)](a, out, 64)
    assert torch.equal(out, a.double().sum(1).bfloat16())


def test_bfloat16_constants_exist() -> None:
    out = torch.zeros(16, dtype=torch.bfloat16)
    fill[(1,)](out, 1.5, 16)
    assert out.tolist() == [1.5] * 16


def test_a_launch_leaves_the_language_as_it_was() -> None:
    before = (tl.load, tl.core.load, dict(vars(tl.tensor)))
    row_sums[(1,)](random_bfloat16(16, 16), torch.empty(16, dtype=torch.bfloat16), 16)
    assert (tl.load, tl.core.load, dict(vars(tl.tensor))) == before


@triton.jit
def copy(source, out, n, N: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    if MASKED:
        tl.store(out + at, tl.load(source + at, mask=at < n), mask=at < n)
    else:
        tl.store(out + at, tl.load(source + at))


@triton.jit
def shift(buffer, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    inside = at + 1 < n
    tl.store(buffer + at, tl.load(buffer + at + 1, mask=inside), mask=inside)


@triton.jit
def write_one_place(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def write_one_place_by_lanes(out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes // 2, lanes)


@triton.jit
def count(out):
    tl.atomic_add(out, 1)


@triton.jit
def last_program(out):
    tl.store(out + tl.program_id(0), tl.num_programs(0))


@triton.jit
def hinted(
    source, out, offset, MULTIPLE: tl.constexpr, CONTIGUOUS: tl.constexpr, STEP: tl.constexpr
):
    at = offset + tl.arange(0, 16) * STEP
    at = tl.max_contiguous(tl.multiple_of(at, MULTIPLE), CONTIGUOUS)
    tl.store(out + tl.arange(0, 16), tl.load(source + at))


def test_an_unmasked_tail_is_out_of_bounds() -> None:
    source, out = torch.ones(40), torch.zeros(64)
    with pytest.raises(OutOfBoundsError, match="load"), sanitized():
        copy[(2,)](source, out, 40, 32, MASKED=False)
    with pytest.raises(OutOfBoundsError, match="store"), sanitized():
        copy[(2,)](torch.ones(64), torch.zeros(40), 40, 32, MASKED=False)
    with sanitized():
        copy[(2,)](source, out, 40, 32, MASKED=True)
    assert out.sum() == 40


def test_what_only_an_address_reaches_must_be_named() -> None:
    low, high = sorted([torch.ones(64), torch.ones(64)], key=lambda tensor: tensor.data_ptr())
    with pytest.raises(OutOfBoundsError), sanitized():
        arithmetic_by_address[(1,)](low.data_ptr(), high, 64)
    with sanitized(low):
        arithmetic_by_address[(1,)](low.data_ptr(), high, 64)


@triton.jit
def arithmetic_by_address(address, out, N: tl.constexpr):
    source = address.to(tl.pointer_type(tl.float32))
    lanes = tl.arange(0, N)
    tl.store(out + lanes, tl.load(source + lanes) + 1)


def test_reading_what_a_neighbour_writes_is_a_race() -> None:
    with pytest.raises(RaceError), sanitized():
        shift[(2,)](torch.ones(64), 64, 32)
    with sanitized():
        shift[(1,)](torch.ones(64), 64, 64)


def test_two_programs_that_write_one_place_are_a_race() -> None:
    with pytest.raises(RaceError), sanitized():
        write_one_place[(2,)](torch.zeros(1, dtype=torch.int32))


def test_lanes_that_write_different_values_to_one_place_are_a_race() -> None:
    with pytest.raises(RaceError, match="lanes"), sanitized():
        write_one_place_by_lanes[(1,)](torch.zeros(8, dtype=torch.int32), 16)


def test_atomics_of_several_programs_are_no_race() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    with sanitized():
        count[(5,)](counter)
    assert counter.item() == 5


def test_launches_after_one_another_are_no_race() -> None:
    buffer = torch.zeros(2, dtype=torch.int32)
    with sanitized():
        last_program[(2,)](buffer)
        last_program[(2,)](buffer)
    assert buffer.tolist() == [2, 2]


def test_programs_run_in_an_order_of_the_seed_and_each_once() -> None:
    orders = []
    for seed in (0, 0, 1):
        sanitizer = triton_sanitizer.Sanitizer([], seed)
        orders.append([sanitizer.place((x, y, 0), (4, 3, 1)) for x in range(4) for y in range(3)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == [(x, y, 0) for x in range(4) for y in range(3)] != orders[0]


@pytest.mark.parametrize(
    ("offset", "multiple", "contiguous", "step"), [(4, 8, 8, 1), (0, 1, 8, 2), (0, 8, 1, 4)]
)
def test_a_false_hint_is_caught(offset: int, multiple: int, contiguous: int, step: int) -> None:
    with pytest.raises(FalseHintError), sanitized():
        hinted[(1,)](torch.ones(64), torch.ones(16), offset, multiple, contiguous, step)


@pytest.mark.parametrize(
    ("offset", "multiple", "contiguous", "step"), [(8, 8, 16, 1), (8, 8, 1, 8), (24, 8, 8, 1)]
)
def test_a_true_hint_passes(offset: int, multiple: int, contiguous: int, step: int) -> None:
    with sanitized():
        hinted[(1,)](torch.ones(200), torch.ones(16), offset, multiple, contiguous, step)


def test_outside_the_block_nothing_is_checked() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    write_one_place[(2,)](out)
    assert out.item() == 1
