"""Triton version of sample; sample_contract.py has the rules, and why all versions agree.

A vocabulary is read in splits of SPLIT tokens, a program a split and row, so that few rows keep
all of a GPU busy: once for the best logits, once for the masses' sums, and then one split for the
token. Filters find their edges by bisection, a program a row, with three thresholds tried in each
pass over the row; top_k and top_p stop as soon as what is kept can't change. A filter that is off
in a row is skipped there, on the device: with all of them off, a row costs the filters' program no
more than its start.

The launches, and their keys, depend on what is given, never on values: the best logits alone, draws
without filters (all None), and draws with them (those that are None count as off in every row).

The kernels are compiled without fusing products with sums: that is what fixes a mass to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.launch_config import (
    WIDE,
    LaunchConfig,
    aligned,
    fixed_kernel,
    pointer,
    wide_row,
    wide_size,
)
from quickchange_kernels.sampling import sample_plain

SPLIT = 4096  # tokens of one program
EDIT_BLOCK = 512

_MASS_BITS = tl.constexpr(sample_plain.MASS_BITS)
_SMALLEST_TEMPERATURE = tl.constexpr(sample_plain.SMALLEST_TEMPERATURE)
_LOG2_E = tl.constexpr(sample_plain.LOG2_E)
_ROUNDER = tl.constexpr(sample_plain.ROUNDER)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(value) for value in sample_plain.EXP2)
_NEVER = tl.constexpr(float("-inf"))
_LOWEST_KEY = tl.constexpr(-0x7F800001)  # key of -inf
_FAR = tl.constexpr(2**31 - 1)
_DEPTH_UNIT = tl.constexpr(-sample_plain.DEPTH_UNIT)
_MOST_DEPTH = tl.constexpr(1 << 22)
_LIMB = tl.constexpr(1 << 21)


@triton.jit
def _best_number(value):
    """(the best value that is a number, -inf where none is; 1 where one is not a number)."""
    other = value != value
    return tl.max(tl.where(other, _NEVER, value), 0), tl.max(other.to(tl.int32), 0)


@triton.jit
def _row_peak(best, row, splits, SPLITS: tl.constexpr):
    """(the row's best logit, 0 where it is not sound; whether it is sound)."""
    s = tl.arange(0, SPLITS)
    value = tl.load(best + row * splits + s, mask=s < splits, other=_NEVER)
    peak, nan = _best_number(value)
    sound = (nan == 0) & (peak > _NEVER) & (peak < -_NEVER)
    return tl.where(sound, peak, 0.0), sound


@triton.jit
def _powers(logit, peak, scale):
    """float32 log2 of weights: bit for bit `sample_plain.powers`."""
    power = tl.div_rn(logit - peak, scale + tl.zeros_like(logit))
    power = power * _LOG2_E
    return tl.where((power > -64.0) & (power <= 0.0), power, -64.0)


@triton.jit
def _depths(power):
    return (power * _DEPTH_UNIT).to(tl.int32)


@triton.jit
def _masses(power):
    """int64 masses of weights' log2: bit for bit `sample_plain.masses`."""
    whole = power + _ROUNDER
    whole = whole - _ROUNDER
    part = power - whole
    value = _C4 + part * _C5
    value = value * part + _C3
    value = value * part + _C2
    value = value * part + _C1
    value = value * part + _C0
    value = value * part + 1.0
    exponent = (whole.to(tl.int32) + (127 + _MASS_BITS)) << 23
    return (value * exponent.to(tl.float32, bitcast=True)).to(tl.int64)


@triton.jit
def _keys(logit):
    """int32 that order as the logits do; zeros of both signs are equal."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _scale(temperature, row):
    return tl.maximum(tl.load(temperature + row).to(tl.float32), _SMALLEST_TEMPERATURE)


@triton.jit
def _narrow(low, high, over, wanted, step, sum1, sum2, sum3):
    """The bracket after a pass that tried low + step, low + 2 step and low + 3 step."""
    up1, up2, up3 = sum1 >= wanted, sum2 >= wanted, sum3 >= wanted
    steps = up1.to(tl.int64) + up2.to(tl.int64) + up3.to(tl.int64)
    reached = tl.where(up3, sum3, tl.where(up2, sum2, sum1)) - wanted
    over = tl.where(up1, reached, over)
    high = tl.where(up3, high, low + (steps + 1) * step)
    return low + steps * step, high, over


@triton.jit
def _logits(place, start, V, BLOCK: tl.constexpr):
    """(tokens start to start + BLOCK, their logits in float32)."""
    i = start + tl.arange(0, BLOCK)
    return i, tl.load(place + i, mask=i < V, other=_NEVER).to(tl.float32)


@triton.jit
def _cut(logit, power, cut, least):
    """int64 masses that top_k, top_p and min_p keep, 0 elsewhere."""
    mass = tl.where(_keys(logit) >= cut, _masses(power), 0)
    return tl.where(mass >= least, mass, 0)


@triton.jit
def _kept(logit, row, peak, temperature, edges, FILTERED: tl.constexpr):
    """int64 masses of a row's float32 logits, 0 for what its filters drop."""
    power = _powers(logit, peak, _scale(temperature, row))
    if FILTERED:
        edge = edges + 4 * row
        mass = _cut(logit, power, tl.load(edge), tl.load(edge + 1))
        away = tl.abs(_depths(power).to(tl.int64) - tl.load(edge + 2))
        return tl.where(away <= tl.load(edge + 3), mass, 0)
    return _masses(power)


@fixed_kernel
def edit_kernel(
    # pointers
    logits,  # float32 [R, V]
    begin,  # [4 R + 1]
    token,  # [E]
    value,  # [E]
    # strides
    stride_row,
    # meta
    BLOCK: tl.constexpr,
):
    """Program (row,): makes the row's edits, kind after kind."""
    row = tl.program_id(0).to(tl.int64)
    for kind in tl.static_range(4):
        first = tl.load(begin + 4 * row + kind)
        end = tl.load(begin + 4 * row + kind + 1)
        for start in range(first, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            live = i < end
            place = logits + row * stride_row + tl.load(token + i, mask=live, other=0)
            change = tl.load(value + i, mask=live, other=1.0)
            now = tl.load(place, mask=live, other=0.0)
            if kind == 0:
                changed = now + change
            elif kind == 1:
                changed = change
            elif kind == 2:
                changed = tl.where(now < 0, now * change, tl.div_rn(now, change))
            else:
                changed = now - change
            tl.store(place, changed, mask=live)
        tl.debug_barrier()  # a token of this kind may stand in the next one, on another thread


@fixed_kernel
def peak_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits], NaN where a split holds one
    place,  # int32 [R, splits] the first token with the best logit
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, split): the split's best logit and its place."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    place_of_row = wide_row(logits, row * stride_row, ALIGNED)
    i, logit = _logits(place_of_row, split * BLOCK, wide_size(V, logits, ALIGNED), BLOCK)
    peak, nan = _best_number(logit)
    first = tl.min(tl.where(logit == peak, i, _FAR), 0)
    tl.store(best + row * splits + split, tl.where(nan > 0, float("nan"), peak))
    tl.store(place + row * splits + split, first)


@triton.jit
def _kth_key(place, peak, limit, V, BLOCK: tl.constexpr):
    """The key of the k-th best logit; the lowest where the filter is off."""
    wanted = tl.minimum(limit, V).to(tl.int64)
    low = tl.full((), _LOWEST_KEY, tl.int64)
    high = _keys(peak).to(tl.int64) + 1
    over = tl.full((), 1, tl.int64)
    if (wanted <= 0) | (wanted >= V):
        over = tl.full((), 0, tl.int64)
    while (high - low > 1) & (over > 0):
        step = tl.maximum((high - low) // 4, 1)
        count1 = tl.zeros((BLOCK,), tl.int32)
        count2 = tl.zeros((BLOCK,), tl.int32)
        count3 = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, V, BLOCK):
            _, logit = _logits(place, start, V, BLOCK)
            key = _keys(logit).to(tl.int64)
            count1 += (key >= low + step).to(tl.int32)
            count2 += (key >= low + 2 * step).to(tl.int32)
            count3 += (key >= low + 3 * step).to(tl.int32)
        low, high, over = _narrow(
            low, high, over, wanted, step,
            tl.sum(count1, 0).to(tl.int64), tl.sum(count2, 0).to(tl.int64),
            tl.sum(count3, 0).to(tl.int64),
        )  # fmt: skip
    return low


@triton.jit
def _nucleus_edge(place, peak, scale, cut, limit, V, BLOCK: tl.constexpr):
    """The least mass in the nucleus of what top_k left."""
    held = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        _, logit = _logits(place, start, V, BLOCK)
        held += _cut(logit, _powers(logit, peak, scale), cut, 1)
    total = tl.sum(held, 0)
    wanted = tl.maximum((total.to(tl.float64) * limit).to(tl.int64), 1)
    # all masses below it are less than total - wanted together
    low = tl.maximum((total - wanted) // V, 1)
    high = (tl.full((), 1, tl.int64) << _MASS_BITS) + 1
    over = high
    while (high - low > 1) & (over >= low):
        step = tl.maximum((high - low) // 4, 1)
        sum1 = tl.zeros((BLOCK,), tl.int64)
        sum2 = tl.zeros((BLOCK,), tl.int64)
        sum3 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            _, logit = _logits(place, start, V, BLOCK)
            mass = _cut(logit, _powers(logit, peak, scale), cut, 1)
            sum1 += tl.where(mass >= low + step, mass, 0)
            sum2 += tl.where(mass >= low + 2 * step, mass, 0)
            sum3 += tl.where(mass >= low + 3 * step, mass, 0)
        low, high, over = _narrow(
            low, high, over, wanted, step,
            tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0),
        )  # fmt: skip
    return low


@triton.jit
def _near(place, peak, scale, cut, least, limit, V, BLOCK: tl.constexpr):
    """(the mean depth, how far from it depths are kept) of what the filters before left."""
    total = tl.zeros((BLOCK,), tl.int64)
    upper = tl.zeros((BLOCK,), tl.int64)
    lower = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        _, logit = _logits(place, start, V, BLOCK)
        power = _powers(logit, peak, scale)
        mass = _cut(logit, power, cut, least)
        depth = _depths(power).to(tl.int64)
        total += mass
        upper += mass // _LIMB * depth
        lower += mass % _LIMB * depth
    whole = tl.sum(total, 0).to(tl.float64)
    weighted = tl.sum(upper, 0).to(tl.float64) * _LIMB + tl.sum(lower, 0).to(tl.float64)
    # an unsound row has no mass; token_kernel gives it token 0
    mean = (weighted / tl.maximum(whole, 1.0)).to(tl.int64)
    wanted = tl.maximum((whole * limit).to(tl.int64), 1)
    low = tl.full((), 0, tl.int64)  # depths at least so close, counted from _MOST_DEPTH
    high = tl.full((), _MOST_DEPTH + 1, tl.int64)
    over = high
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        sum1 = tl.zeros((BLOCK,), tl.int64)
        sum2 = tl.zeros((BLOCK,), tl.int64)
        sum3 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            _, logit = _logits(place, start, V, BLOCK)
            power = _powers(logit, peak, scale)
            mass = _cut(logit, power, cut, least)
            close = -tl.abs(_depths(power).to(tl.int64) - mean) + _MOST_DEPTH
            sum1 += tl.where(close >= low + step, mass, 0)
            sum2 += tl.where(close >= low + 2 * step, mass, 0)
            sum3 += tl.where(close >= low + 3 * step, mass, 0)
        low, high, over = _narrow(
            low, high, over, wanted, step,
            tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0),
        )  # fmt: skip
    return mean, -low + _MOST_DEPTH


@fixed_kernel
def filter_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    temperature,  # float64 [R]
    top_k,  # float64 [R], as all filters; None: off
    top_p,
    min_p,
    typical_p,
    edges,  # int64 [R, 4]: least key, least mass, mean depth and how far from it depths are kept
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row,): what the row's filters keep."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(temperature + row) > 0:
        width = wide_size(V, logits, ALIGNED)
        place = wide_row(logits, row * stride_row, ALIGNED)
        peak, _ = _row_peak(best, row, splits, SPLITS)
        scale = _scale(temperature, row)
        cut = _kth_key(place, peak, tl.load(top_k + row), width, BLOCK)
        least = tl.full((), 1, tl.int64)
        nucleus = tl.load(top_p + row)
        if nucleus < 1:
            least = _nucleus_edge(place, peak, scale, cut, nucleus, width, BLOCK)
        unit = tl.full((), 1, tl.int64) << _MASS_BITS
        floor = (tl.load(min_p + row) * unit.to(tl.float64)).to(tl.int64)
        least = tl.maximum(least, tl.minimum(floor, unit))
        mean = tl.full((), 0, tl.int64)
        reach = tl.full((), _FAR, tl.int64)
        typical = tl.load(typical_p + row)
        if typical < 1:
            mean, reach = _near(place, peak, scale, cut, least, typical, width, BLOCK)
        tl.store(edges + 4 * row, cut)
        tl.store(edges + 4 * row + 1, least)
        tl.store(edges + 4 * row + 2, mean)
        tl.store(edges + 4 * row + 3, reach)


@fixed_kernel
def sum_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    temperature,  # float64 [R]
    edges,  # int64 [R, 4], not read unless FILTERED
    sums,  # int64 [R, splits] of the kept masses
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, split): the sum of the split's kept masses."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(temperature + row) > 0:
        peak, _ = _row_peak(best, row, splits, SPLITS)
        place = wide_row(logits, row * stride_row, ALIGNED)
        _, logit = _logits(place, split * BLOCK, wide_size(V, logits, ALIGNED), BLOCK)
        mass = _kept(logit, row, peak, temperature, edges, FILTERED)
        tl.store(sums + row * splits + split, tl.sum(mass, 0))


@fixed_kernel
def token_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    place,  # int32 [R, splits]
    temperature,  # float64 [R], None unless DRAWN; so are those up to sums
    uniform,  # float64 [R]
    edges,  # int64 [R, 4], not read unless FILTERED
    sums,  # int64 [R, splits]
    tokens,  # int64 [R]
    soundness,  # bool [R]
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    DRAWN: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row,): the row's token, drawn or the best."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    live = s < splits
    peak, sound = _row_peak(best, row, splits, SPLITS)
    highest = tl.load(best + row * splits + s, mask=live, other=_NEVER)
    first = tl.load(place + row * splits + s, mask=live, other=_FAR)
    token = tl.min(tl.where(highest == peak, first, _FAR), 0)
    if DRAWN:  # noqa: SIM102  a constant: nothing below is compiled without it
        if sound & (tl.load(temperature + row) > 0):
            sum_of = tl.load(sums + row * splits + s, mask=live, other=0)
            total = tl.sum(sum_of, 0)
            target = (total.to(tl.float64) * tl.load(uniform + row)).to(tl.int64)
            # a uniform of 1, which the contract does not have, stays in the row
            target = tl.minimum(target, total - 1)
            passed = live & (tl.cumsum(sum_of, 0) <= target)
            target -= tl.sum(tl.where(passed, sum_of, 0), 0)
            own = wide_row(logits, row * stride_row, ALIGNED)
            start = tl.sum(passed.to(tl.int32), 0) * BLOCK
            i, logit = _logits(own, start, wide_size(V, logits, ALIGNED), BLOCK)
            mass = _kept(logit, row, peak, temperature, edges, FILTERED)
            token = tl.min(tl.where(tl.cumsum(mass, 0) > target, i, _FAR), 0)
    tl.store(tokens + row, tl.where(sound, token, 0).to(tl.int64))
    tl.store(soundness + row, sound)


_OFF = (0.0, 1.0, 0.0, 1.0)  # top_k, top_p, min_p and typical_p that keep everything


def launch_sample(
    logits: Tensor,
    temperature: Tensor | None,
    uniform: Tensor | None,
    filters: Sequence[Tensor | None],
    edit_begin: Tensor | None,
    edit_token: Tensor | None,
    edit_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sample; see sample_contract.py."""
    rows, size = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    sound = torch.empty(rows, dtype=torch.bool, device=device)
    if not rows:
        return tokens, sound
    if edit_begin is not None:
        logits = logits.float()
        edit_kernel[(rows,)](
            logits, edit_begin, edit_token, edit_value, logits.stride(0), **_EDITS.keywords
        )
    splits = triton.cdiv(size, SPLIT)
    best = torch.empty(rows, splits, dtype=torch.float32, device=device)
    place = torch.empty(rows, splits, dtype=torch.int32, device=device)
    sizes = (size, splits, logits.stride(0))
    wide = aligned(logits)
    peak_kernel[(rows, splits)](logits, best, place, *sizes, **_peak(wide).keywords)
    if temperature is None:
        config = _token(size, wide, drawn=False, filtered=False)
        token_kernel[(rows,)](
            logits, best, place, None, None, None, None, tokens, sound, *sizes, **config.keywords
        )
        return tokens, sound
    sums = torch.empty(rows, splits, dtype=torch.int64, device=device)
    filtered = any(value is not None for value in filters)
    edges = torch.empty(rows if filtered else 0, 4, dtype=torch.int64, device=device)
    if filtered:
        columns = [
            torch.full_like(temperature, off) if value is None else value
            for value, off in zip(filters, _OFF, strict=True)
        ]
        filter_kernel[(rows,)](
            logits, best, temperature, *columns, edges, *sizes, **_filter(size, wide).keywords
        )
    sum_kernel[(rows, splits)](
        logits, best, temperature, edges, sums, *sizes,
        **_sum(size, wide, filtered=filtered).keywords,
    )  # fmt: skip
    token_kernel[(rows,)](
        logits, best, place, temperature, uniform, edges, sums, tokens, sound, *sizes,
        **_token(size, wide, drawn=True, filtered=filtered).keywords,
    )  # fmt: skip
    return tokens, sound


def _config(num_warps: int, **constants: int | bool) -> LaunchConfig:
    return LaunchConfig(constants, num_warps, options={"enable_fp_fusion": False})


_EDITS = _config(4, BLOCK=EDIT_BLOCK)


def _peak(wide: bool) -> LaunchConfig:
    return _config(8, ALIGNED=wide, BLOCK=SPLIT)


def _shape(vocabulary: int, wide: bool) -> dict[str, int | bool]:
    splits = triton.next_power_of_2(triton.cdiv(vocabulary, SPLIT))
    return {"SPLITS": splits, "ALIGNED": wide, "BLOCK": SPLIT}


def _filter(vocabulary: int, wide: bool) -> LaunchConfig:
    return _config(16, **_shape(vocabulary, wide))


def _sum(vocabulary: int, wide: bool, *, filtered: bool) -> LaunchConfig:
    return _config(8, FILTERED=filtered, **_shape(vocabulary, wide))


def _token(vocabulary: int, wide: bool, *, drawn: bool, filtered: bool) -> LaunchConfig:
    return _config(8, DRAWN=drawn, FILTERED=filtered, **_shape(vocabulary, wide))


_TYPES = {
    "best": "*fp32", "place": "*i32", "temperature": "*fp64", "uniform": "*fp64",
    "top_k": "*fp64", "top_p": "*fp64", "min_p": "*fp64", "typical_p": "*fp64", "edges": "*i64",
    "sums": "*i64", "tokens": "*i64", "soundness": "*u1", "begin": "*i32", "token": "*i32",
    "value": "*fp32", "V": "i32", "splits": "i32", "stride_row": "i32",
}  # fmt: skip


def compilations_for(
    vocabulary: int, dtype: torch.dtype, *, wide: bool | None = None
) -> Iterator[Compilation]:
    """All that sample launches for logits of one dtype; those that are edited are float32 too.

    wide: `aligned` of the logits; None: as rows of the vocabulary's size are.
    """
    if wide is None:
        wide = vocabulary * dtype.itemsize % WIDE == 0
    greedy, drawn = (_token(vocabulary, wide, drawn=on, filtered=False) for on in (False, True))
    absent: dict[str, str | None] = dict.fromkeys(("temperature", "uniform", "edges", "sums"))
    cases: list[tuple[str, Any, LaunchConfig, dict[str, str | None]]] = [
        ("peak", peak_kernel, _peak(wide), {}),
        ("token, greedy", token_kernel, greedy, absent),
        ("sums, no filter", sum_kernel, _sum(vocabulary, wide, filtered=False), {}),
        ("token, no filter", token_kernel, drawn, {}),
        ("filters", filter_kernel, _filter(vocabulary, wide), {}),
        ("sums, all filters", sum_kernel, _sum(vocabulary, wide, filtered=True), {}),
        (
            "token, all filters",
            token_kernel,
            _token(vocabulary, wide, drawn=True, filtered=True),
            {},
        ),
    ]
    if dtype == torch.float32:
        cases.append(("edits", edit_kernel, _EDITS, {}))
    types = {"logits": pointer(dtype), **_TYPES}
    for name, kernel, config, given in cases:
        named = [arg for arg in kernel.arg_names if arg not in config.constants]
        yield config.compilation(
            f"sample {name}, {vocabulary}{'' if wide else ', odd'}, {pointer(dtype)[1:]}",
            kernel,
            {arg: given[arg] if arg in given else types[arg] for arg in named},
        )


def compilations() -> Iterator[Compilation]:
    """Configurations for Llama-3's vocabulary, with all filters and with none."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from compilations_for(128_256, dtype)
