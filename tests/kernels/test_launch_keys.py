"""No size at run time makes a launch key that was not compiled ahead."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from launch_keys import Key, key_of, keys_of, recorded_keys

from quickchange_kernels.aot import compiling
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.elementwise import elementwise_triton
from quickchange_kernels.linear import linear_fixed_triton
from quickchange_kernels.lowrank import lowrank_experts_triton, lowrank_triton
from quickchange_kernels.lowrank.lowrank_tables import LARGE_TILE, SMALL_TILE
from quickchange_kernels.sampling import sample_triton, token_mask_triton, verify_triton
from quickchange_kernels.sampling.token_mask import mask_words
from quickchange_kernels.turbo_heads import draft_logits_triton, turbo_heads_triton

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ROWS = st.integers(1, 70)
WIDTHS = st.sampled_from([8, 36, 64, 100, 1500, 4096])


def assert_ahead(keys: list[Key], compilations: Iterable[Compilation]) -> None:
    ahead = keys_of(compilations)
    assert keys
    for key in keys:
        assert key in ahead, f"not compiled ahead: {key}\n" + "\n".join(
            str(each) for each in ahead if each[0] == key[0]
        )


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values in memory that begins 4 or 8 bytes off, as a part of a larger buffer may."""
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape)


@st.composite
def lowrank_operands(draw: st.DrawFn, dtype: torch.dtype, wide: bool) -> tuple[object, ...]:
    pieces, slots, groups = draw(ROWS), draw(st.integers(1, 33)), draw(st.integers(1, 129))
    pages = draw(st.integers(1, 200))
    tables = [
        empty(4096, dtype=dtype),
        int32(slots, groups, 2),
        torch.zeros(pages, 4, dtype=torch.int64),
        torch.zeros(pages),
        torch.zeros(pages, 8),
        int32(pages),
        int32(pieces, 2),
        int32(pieces),
        torch.zeros(pieces),
        int32(pieces, 4),
        int32(draw(ROWS), 4),
    ]
    if draw(st.booleans()):
        tables[1:] = [unaligned(table) for table in tables[1:]]
    height = draw(st.sampled_from([SMALL_TILE, LARGE_TILE]))
    most_pages = 2 ** draw(st.integers(0, 8))
    return (*tables, height, draw(st.integers(0, groups - 1)), most_pages, wide)


@settings(deadline=None, max_examples=40)
@given(st.data(), DTYPES, ROWS, WIDTHS)
def test_lowrank(data: st.DataObject, dtype: torch.dtype, rows: int, features: int) -> None:
    wide = features % 8 == 0
    operands = data.draw(lowrank_operands(dtype, wide))
    width = data.draw(st.sampled_from([8, 48, 6144] if wide else [9, 100]))
    x, y = empty(rows, features, dtype=dtype), empty(rows, width, dtype=dtype)
    with recorded_keys() as keys:
        lowrank_triton.launch_lowrank(y, x, *operands)
    assert_ahead(keys, lowrank_triton.compilations_for(features, dtype, wide=wide, dependent=True))


@settings(deadline=None, max_examples=40)
@given(st.data(), DTYPES, ROWS, st.integers(1, 200_000))
def test_lowrank_embedding(
    data: st.DataObject, dtype: torch.dtype, rows: int, vocabulary: int
) -> None:
    operands = data.draw(lowrank_operands(dtype, wide=True))
    y, ids = empty(rows, 64, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    with recorded_keys() as keys:
        lowrank_triton.launch_lowrank_embedding(y, ids, *operands, vocabulary)
    ahead = lowrank_triton.compilations_for(0, dtype, wide=True, dependent=True, embedding=True)
    assert_ahead(keys, ahead)


@settings(deadline=None, max_examples=40)
@given(st.data(), DTYPES, ROWS, st.integers(1, 16), st.booleans())
def test_lowrank_experts(
    data: st.DataObject, dtype: torch.dtype, tokens: int, choices: int, spread: bool
) -> None:
    operands = data.draw(lowrank_operands(dtype, wide=True))
    rows = tokens * choices
    x = empty(rows if spread else tokens, 64, dtype=dtype)
    y, expert = empty(rows, 48, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    with recorded_keys() as keys:
        lowrank_experts_triton.launch_lowrank_experts(y, x, expert, choices, 8, *operands)
    assert_ahead(keys, lowrank_experts_triton.compilations_for(dtype, wide=True))


@settings(deadline=None, max_examples=40)
@given(
    DTYPES,
    st.integers(1, 65),
    st.sampled_from([512, 32_000, 50_257, 128_256]),
    st.booleans(),
    st.integers(0, 15),
    st.integers(0, 99),
)
def test_sample(
    dtype: torch.dtype, rows: int, vocabulary: int, drawn: bool, filters: int, edits: int
) -> None:
    def column() -> Tensor:
        return torch.zeros(rows, dtype=torch.float64)

    logits = torch.empty_strided((rows, vocabulary), (vocabulary, 1), dtype=dtype)
    given_filters = [column() if filters >> i & 1 else None for i in range(4)]
    changes = (int32(4 * rows + 1), int32(edits), torch.zeros(edits)) if edits else (None,) * 3
    with recorded_keys() as keys:
        sample_triton.launch_sample(
            logits,
            column() if drawn else None,
            column() if drawn else None,
            given_filters,
            *changes,
        )
    used = torch.float32 if edits else dtype
    assert_ahead(keys, sample_triton.compilations_for(vocabulary, used))
    assert len(set(keys)) == len(keys) <= 5


@settings(deadline=None, max_examples=40)
@given(DTYPES, ROWS, st.integers(1, 40), st.sampled_from([31, 512, 50_257]))
def test_token_mask(dtype: torch.dtype, rows: int, masks: int, vocabulary: int) -> None:
    logits = empty(rows, vocabulary, dtype=dtype)
    bits = int32(masks, mask_words(vocabulary))
    with recorded_keys() as keys:
        token_mask_triton.launch_token_mask_(logits, torch.zeros(masks, dtype=torch.int64), bits)
    assert_ahead(keys, token_mask_triton.compilations_for(dtype))


@settings(deadline=None, max_examples=40)
@given(ROWS, ROWS, st.integers(1, 128))
def test_verify(rows: int, sequences: int, longest: int) -> None:
    tokens = torch.zeros(rows, dtype=torch.int64)
    with recorded_keys() as keys:
        verify_triton.launch_verify(tokens, unaligned(tokens), int32(sequences, 2), longest)
    assert_ahead(keys, verify_triton.compilations())


@settings(deadline=None, max_examples=40)
@given(DTYPES, DTYPES, ROWS, st.integers(1, 9), WIDTHS, st.integers(1, 5000), st.booleans())
def test_draft_logits(
    dtype: torch.dtype,
    head: torch.dtype,
    rows: int,
    segments: int,
    features: int,
    width: int,
    biased: bool,
) -> None:
    h, weight = empty(rows, features, dtype=dtype), empty(3, features, dtype=head)
    bias = empty(3, dtype=head) if biased else None
    with recorded_keys() as keys:
        draft_logits_triton.launch_draft_logits(
            h, weight, bias, unaligned(int32(rows)), int32(segments, 4), width
        )
    ahead = draft_logits_triton.compilations_for(features, dtype, head, bias=biased)
    assert_ahead(keys, ahead)


@settings(deadline=None, max_examples=40)
@given(DTYPES, DTYPES, ROWS, ROWS, st.integers(1, 9), WIDTHS, WIDTHS)
def test_turbo_heads(
    dtype: torch.dtype,
    weights: torch.dtype,
    rows: int,
    items: int,
    segments: int,
    features: int,
    width: int,
) -> None:
    x, z = empty(rows, width, dtype=dtype), empty(rows, features, dtype=dtype)
    tables = (
        empty(4096, dtype=weights),
        torch.zeros(items, dtype=torch.int64),
        int32(items, 2),
        unaligned(int32(items, 2)),
        unaligned(int32(segments, 3)),
    )
    ahead = [
        one
        for residual in (False, True)
        for one in turbo_heads_triton.compilations_for(
            width, features, dtype, weights, residual=residual
        )
    ]
    with recorded_keys() as keys:
        turbo_heads_triton.launch_turbo_heads(x, z, *tables)
        turbo_heads_triton.launch_head_logits(z, *tables, width)
    assert_ahead(keys, ahead)


@settings(deadline=None, max_examples=40)
@given(DTYPES, ROWS, WIDTHS)
def test_norms_and_gates(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = empty(rows, width, dtype=dtype), empty(width, dtype=dtype)
    with recorded_keys() as keys:
        elementwise_triton.launch_rms_norm(x, weight, 1e-6)
        elementwise_triton.launch_add_rms_norm(x, x, weight, 1e-5, 1.0)
    assert_ahead(keys, elementwise_triton.norm_compilations_for(width, dtype))
    with recorded_keys() as keys:
        elementwise_triton.launch_silu_mul(empty(rows, 2 * width, dtype=dtype))
    assert_ahead(keys, elementwise_triton.gate_compilations_for(width, dtype))


@settings(deadline=None, max_examples=40)
@given(DTYPES, st.integers(1, 3000), WIDTHS, WIDTHS, st.booleans())
def test_linear_fixed(
    dtype: torch.dtype, rows: int, features: int, outputs: int, biased: bool
) -> None:
    x, weight = empty(rows, features, dtype=dtype), empty(outputs, features, dtype=dtype)
    bias = empty(outputs, dtype=dtype) if biased else None
    with recorded_keys() as keys:
        linear_fixed_triton.launch_linear_fixed(x, weight, bias)
    ahead = linear_fixed_triton.compilations_for(outputs, features, dtype, bias=biased)
    assert_ahead(keys, ahead)


@settings(deadline=None, max_examples=40)
@given(DTYPES, ROWS, st.integers(1, 33), st.integers(1, 9), st.sampled_from([64, 80, 128]))
def test_rotary(dtype: torch.dtype, rows: int, heads: int, kv_heads: int, size: int) -> None:
    qkv = empty(rows, heads + 2 * kv_heads, size, dtype=dtype)
    q, k, _ = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
    cos = empty(rows, size, dtype=dtype)
    with recorded_keys() as keys:
        elementwise_triton.launch_rotary_(q, k, cos, cos)
    assert_ahead(keys, elementwise_triton.rotary_compilations_for(size, dtype))


def test_no_argument_of_a_kernel_is_specialised() -> None:
    for module in compiling.kernel_modules():
        if ".attention." in module:
            continue
        for one in compiling.compilations_of(module):
            kept = [
                each.name
                for each in one.kernel.params
                if not each.is_constexpr and not each.do_not_specialize
            ]
            assert not kept, f"{one.kernel.fn.__name__} is compiled anew by {kept}"
            assert key_of(one)


def test_globals_of_a_kernel_equal_themselves() -> None:
    """Triton compares them at every launch, and refuses what has changed; NaN always has."""
    for module in compiling.kernel_modules():
        for one in compiling.compilations_of(module):
            assert one.kernel.cache_key
            for (name, _), (value, found) in one.kernel.used_global_vals.items():
                assert found[name] == value, f"{one.kernel.fn.__name__}: {name}"
