"""Triton version of sample; sample_contract.py has the rules, and why all versions agree.

A vocabulary is read in splits of SPLIT tokens, a program a split and row, so that few rows keep
all of a GPU busy: once for the best logits, once for the masses' sums, and then one split for the
token. top_k, top_p and typical_p find their edge by bisection, a program a row, with three
thresholds tried in each pass over the row; the first two stop as soon as what is kept can't change.
The launches depend on shapes and on which filters are given, never on values.

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
from quickchange_kernels.sampling import sample_plain

SPLIT = 4096  # tokens of one program
EDIT_BLOCK = 512

_MASS_BITS = tl.constexpr(sample_plain.MASS_BITS)
_SMALLEST_TEMPERATURE = tl.constexpr(sample_plain.SMALLEST_TEMPERATURE)
_LOG2_E = tl.constexpr(sample_plain.LOG2_E)
_ROUNDER = tl.constexpr(sample_plain.ROUNDER)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(value) for value in sample_plain.EXP2)
_NEVER = tl.constexpr(float("-inf"))
_NAN = tl.constexpr(float("nan"))
_LOWEST_KEY = tl.constexpr(-0x7F800001)  # key of -inf
_FAR = tl.constexpr(2**31 - 1)
_DEPTH_UNIT = tl.constexpr(-sample_plain.DEPTH_UNIT)
_MOST_DEPTH = tl.constexpr(1 << 22)
_LIMB = tl.constexpr(1 << 21)


@triton.jit
def _row_peak(best, row, splits, SPLITS: tl.constexpr):
    """(the row's best logit, 0 where it is not sound; whether it is sound)."""
    s = tl.arange(0, SPLITS)
    value = tl.load(best + row * splits + s, mask=s < splits, other=_NEVER)
    peak = tl.max(value, 0)
    nan = tl.max((value != value).to(tl.int32), 0)
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
def _least_mass(least, min_p, row, FILTERED: tl.constexpr, FLOORED: tl.constexpr):
    """The least mass that top_p and min_p keep, at least 1."""
    lowest = tl.full((), 1, tl.int64)
    if FILTERED:
        lowest = tl.load(least + row)
    if FLOORED:
        unit = tl.full((), 1, tl.int64) << _MASS_BITS
        floor = (tl.load(min_p + row) * unit.to(tl.float64)).to(tl.int64)
        lowest = tl.maximum(lowest, tl.minimum(floor, unit))
    return lowest


@triton.jit
def _kept(
    logit,
    row,
    peak,
    temperature,
    kth,
    least,
    min_p,
    near,
    CUT: tl.constexpr,
    FILTERED: tl.constexpr,
    FLOORED: tl.constexpr,
    TYPICAL: tl.constexpr,
):
    """int64 masses of a row's float32 logits, 0 for what its filters drop."""
    power = _powers(logit, peak, _scale(temperature, row))
    mass = _masses(power)
    if CUT:
        mass = tl.where(_keys(logit) >= tl.load(kth + row), mass, 0)
    mass = tl.where(mass >= _least_mass(least, min_p, row, FILTERED, FLOORED), mass, 0)
    if TYPICAL:
        away = tl.abs(_depths(power) - tl.load(near + 2 * row))
        mass = tl.where(away <= tl.load(near + 2 * row + 1), mass, 0)
    return mass


@triton.jit
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


@triton.jit
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
    BLOCK: tl.constexpr,
):
    """Program (row, split): the split's best logit and its place."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    i = split * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride_row + i, mask=i < V, other=_NEVER).to(tl.float32)
    peak = tl.max(logit, 0)
    nan = tl.max((logit != logit).to(tl.int32), 0)
    first = tl.min(tl.where(logit == peak, i, _FAR), 0)
    tl.store(best + row * splits + split, tl.where(nan > 0, _NAN, peak))
    tl.store(place + row * splits + split, first)


@triton.jit
def top_k_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    top_k,  # float64 [R]
    kth,  # int32 [R]: keys >= it are kept
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row,): the key of the k-th best logit."""
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(top_k + row)
    wanted = tl.minimum(limit, V).to(tl.int64)
    peak, _ = _row_peak(best, row, splits, SPLITS)
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
            i = start + tl.arange(0, BLOCK)
            logit = tl.load(logits + row * stride_row + i, mask=i < V, other=_NEVER)
            key = _keys(logit.to(tl.float32)).to(tl.int64)
            count1 += (key >= low + step).to(tl.int32)
            count2 += (key >= low + 2 * step).to(tl.int32)
            count3 += (key >= low + 3 * step).to(tl.int32)
        low, high, over = _narrow(
            low, high, over, wanted, step,
            tl.sum(count1, 0).to(tl.int64), tl.sum(count2, 0).to(tl.int64),
            tl.sum(count3, 0).to(tl.int64),
        )  # fmt: skip
    tl.store(kth + row, low.to(tl.int32))


@triton.jit
def sum_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    temperature,  # float64 [R]
    kth,  # int32 [R], not read unless CUT
    least,  # int64 [R], not read unless FILTERED
    min_p,  # float64 [R], not read unless FLOORED
    near,  # int32 [R, 2], not read unless TYPICAL
    sums,  # int64 [R, splits] of the kept masses
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    CUT: tl.constexpr,
    FILTERED: tl.constexpr,
    FLOORED: tl.constexpr,
    TYPICAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, split): the sum of the split's kept masses."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(temperature + row) > 0:
        i = split * BLOCK + tl.arange(0, BLOCK)
        peak, _ = _row_peak(best, row, splits, SPLITS)
        logit = tl.load(logits + row * stride_row + i, mask=i < V, other=_NEVER).to(tl.float32)
        mass = _kept(
            logit, row, peak, temperature, kth, least, min_p, near, CUT, FILTERED, FLOORED, TYPICAL
        )
        tl.store(sums + row * splits + split, tl.sum(mass, 0))


@triton.jit
def top_p_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    temperature,  # float64 [R]
    kth,  # int32 [R], not read unless CUT
    top_p,  # float64 [R]
    sums,  # int64 [R, splits] of what top_k left
    least,  # int64 [R]: masses >= it are kept
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row,): the least mass in the nucleus."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.full((), 1, tl.int64)
    limit = tl.load(top_p + row)
    if (limit < 1) & (tl.load(temperature + row) > 0):
        peak, _ = _row_peak(best, row, splits, SPLITS)
        scale = _scale(temperature, row)
        s = tl.arange(0, SPLITS)
        total = tl.sum(tl.load(sums + row * splits + s, mask=s < splits, other=0), 0)
        wanted = tl.maximum((total.to(tl.float64) * limit).to(tl.int64), 1)
        # all masses below it are less than total - wanted together
        low = tl.maximum((total - wanted) // V, 1)
        high = (tl.full((), 1, tl.int64) << _MASS_BITS) + 1
        over = high
        cut = tl.full((), _LOWEST_KEY, tl.int32)
        if CUT:
            cut = tl.load(kth + row)
        while (high - low > 1) & (over >= low):
            step = tl.maximum((high - low) // 4, 1)
            sum1 = tl.zeros((BLOCK,), tl.int64)
            sum2 = tl.zeros((BLOCK,), tl.int64)
            sum3 = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                place = logits + row * stride_row + i
                logit = tl.load(place, mask=i < V, other=_NEVER).to(tl.float32)
                mass = _masses(_powers(logit, peak, scale))
                if CUT:
                    mass = tl.where(_keys(logit) >= cut, mass, 0)
                sum1 += tl.where(mass >= low + step, mass, 0)
                sum2 += tl.where(mass >= low + 2 * step, mass, 0)
                sum3 += tl.where(mass >= low + 3 * step, mass, 0)
            low, high, over = _narrow(
                low, high, over, wanted, step,
                tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0),
            )  # fmt: skip
    tl.store(least + row, low)


@triton.jit
def typical_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    temperature,  # float64 [R]
    kth,  # int32 [R], not read unless CUT
    least,  # int64 [R], not read unless FILTERED
    min_p,  # float64 [R], not read unless FLOORED
    typical_p,  # float64 [R]
    near,  # int32 [R, 2]: the mean depth, and how far from it depths are kept
    # sizes
    V,
    splits,
    # strides
    stride_row,
    # meta
    CUT: tl.constexpr,
    FILTERED: tl.constexpr,
    FLOORED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row,): the depths that typical_p keeps."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.full((), 0, tl.int32)
    low = tl.full((), -_FAR, tl.int64)  # depths at least so close, counted from _MOST_DEPTH
    limit = tl.load(typical_p + row)
    if (limit < 1) & (tl.load(temperature + row) > 0):
        peak, _ = _row_peak(best, row, splits, SPLITS)
        total = tl.zeros((BLOCK,), tl.int64)
        upper = tl.zeros((BLOCK,), tl.int64)
        lower = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = logits + row * stride_row + i
            logit = tl.load(place, mask=i < V, other=_NEVER).to(tl.float32)
            mass = _kept(
                logit, row, peak, temperature, kth, least, min_p, near, CUT, FILTERED, FLOORED,
                False,
            )  # fmt: skip
            depth = _depths(_powers(logit, peak, _scale(temperature, row))).to(tl.int64)
            total += mass
            upper += mass // _LIMB * depth
            lower += mass % _LIMB * depth
        whole = tl.sum(total, 0).to(tl.float64)
        weighted = tl.sum(upper, 0).to(tl.float64) * _LIMB + tl.sum(lower, 0).to(tl.float64)
        # an unsound row has no mass; token_kernel gives it token 0
        mean = (weighted / tl.maximum(whole, 1.0)).to(tl.int32)
        wanted = tl.maximum((whole * limit).to(tl.int64), 1)
        low = tl.full((), 0, tl.int64)
        high = tl.full((), _MOST_DEPTH + 1, tl.int64)
        over = high
        while high - low > 1:
            step = tl.maximum((high - low) // 4, 1)
            sum1 = tl.zeros((BLOCK,), tl.int64)
            sum2 = tl.zeros((BLOCK,), tl.int64)
            sum3 = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                place = logits + row * stride_row + i
                logit = tl.load(place, mask=i < V, other=_NEVER).to(tl.float32)
                mass = _kept(
                    logit, row, peak, temperature, kth, least, min_p, near, CUT, FILTERED, FLOORED,
                    False,
                )  # fmt: skip
                depth = _depths(_powers(logit, peak, _scale(temperature, row)))
                close = (-tl.abs(depth - mean) + _MOST_DEPTH).to(tl.int64)
                sum1 += tl.where(close >= low + step, mass, 0)
                sum2 += tl.where(close >= low + 2 * step, mass, 0)
                sum3 += tl.where(close >= low + 3 * step, mass, 0)
            low, high, over = _narrow(
                low, high, over, wanted, step,
                tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0),
            )  # fmt: skip
    tl.store(near + 2 * row, mean)
    tl.store(near + 2 * row + 1, tl.minimum(-low + _MOST_DEPTH, _FAR).to(tl.int32))


@triton.jit
def token_kernel(
    # pointers
    logits,  # [R, V]
    best,  # float32 [R, splits]
    place,  # int32 [R, splits]
    temperature,  # float64 [R], not read unless DRAWN; so are those up to sums
    uniform,  # float64 [R]
    kth,  # int32 [R], not read unless CUT
    least,  # int64 [R], not read unless FILTERED
    min_p,  # float64 [R], not read unless FLOORED
    near,  # int32 [R, 2], not read unless TYPICAL
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
    CUT: tl.constexpr,
    FILTERED: tl.constexpr,
    FLOORED: tl.constexpr,
    TYPICAL: tl.constexpr,
    SPLITS: tl.constexpr,
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
            i = tl.sum(passed.to(tl.int32), 0) * BLOCK + tl.arange(0, BLOCK)
            logit = tl.load(logits + row * stride_row + i, mask=i < V, other=_NEVER).to(tl.float32)
            mass = _kept(
                logit, row, peak, temperature, kth, least, min_p, near, CUT, FILTERED, FLOORED,
                TYPICAL,
            )  # fmt: skip
            token = tl.min(tl.where(tl.cumsum(mass, 0) > target, i, _FAR), 0)
    tl.store(tokens + row, tl.where(sound, token, 0).to(tl.int64))
    tl.store(soundness + row, sound)


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
    top_k, top_p, min_p, typical_p = filters
    rows, size = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    sound = torch.empty(rows, dtype=torch.bool, device=device)
    if not rows:
        return tokens, sound
    if edit_begin is not None:
        logits = logits.float()
        edit_kernel[(rows,)](
            logits, edit_begin, edit_token, edit_value, logits.stride(0), BLOCK=EDIT_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    splits = triton.cdiv(size, SPLIT)
    best = torch.empty(rows, splits, dtype=torch.float32, device=device)
    place = torch.empty(rows, splits, dtype=torch.int32, device=device)
    sums = torch.empty(rows, splits, dtype=torch.int64, device=device)
    kth = torch.empty(rows, dtype=torch.int32, device=device)
    least = torch.empty(rows, dtype=torch.int64, device=device)
    near = torch.empty(rows, 2, dtype=torch.int32, device=device)
    sizes = (size, splits, logits.stride(0))
    row_grid, split_grid = (rows,), (rows, splits)
    drawn = temperature is not None
    cut, nucleus, floored, typical = (
        drawn and value is not None for value in (top_k, top_p, min_p, typical_p)
    )
    meta = {"SPLITS": triton.next_power_of_2(splits), "BLOCK": SPLIT, "enable_fp_fusion": False}
    each, whole = meta | {"num_warps": 8}, meta | {"num_warps": 16}

    peak_kernel[split_grid](logits, best, place, *sizes, BLOCK=SPLIT, num_warps=8)
    if cut:
        top_k_kernel[row_grid](logits, best, top_k, kth, *sizes, **whole)
    if nucleus:
        sum_kernel[split_grid](
            logits, best, temperature, kth, least, least, near, sums, *sizes,
            CUT=cut, FILTERED=False, FLOORED=False, TYPICAL=False, **each,
        )  # fmt: skip
        top_p_kernel[row_grid](
            logits, best, temperature, kth, top_p, sums, least, *sizes, CUT=cut, **whole
        )
    kept = {"CUT": cut, "FILTERED": nucleus, "FLOORED": floored}
    floor = min_p if floored else least
    if typical:
        typical_kernel[row_grid](
            logits, best, temperature, kth, least, floor, typical_p, near, *sizes,
            **kept, **whole,
        )  # fmt: skip
    kept["TYPICAL"] = typical
    if drawn:
        sum_kernel[split_grid](
            logits, best, temperature, kth, least, floor, near, sums, *sizes, **kept, **each,
        )  # fmt: skip
    token_kernel[row_grid](
        logits, best, place, temperature if drawn else sums, uniform if drawn else sums, kth, least,
        floor, near, sums, tokens, sound, *sizes, DRAWN=drawn, **kept, **each,
    )  # fmt: skip
    return tokens, sound


def compilations() -> Iterator[Compilation]:
    """Configurations for Llama-3's vocabulary, with all filters and with none."""
    yield _compilation("sample edits", edit_kernel, 4, "fp32", BLOCK=EDIT_BLOCK)
    splits = triton.next_power_of_2(triton.cdiv(128_256, SPLIT))
    for dtype in ("fp32", "bf16"):
        yield _compilation(f"sample peak, {dtype}", peak_kernel, 8, dtype, BLOCK=SPLIT)
        shape = {"SPLITS": splits, "BLOCK": SPLIT}
        yield _compilation(f"sample top_k, {dtype}", top_k_kernel, 16, dtype, **shape)
        yield _compilation(f"sample top_p, {dtype}", top_p_kernel, 16, dtype, CUT=True, **shape)
        for on in (False, True):
            kind = f"{'all filters' if on else 'no filter'}, {dtype}"
            filters = {"CUT": on, "FILTERED": on, "FLOORED": on}
            if on:
                yield _compilation(
                    f"sample typical_p, {dtype}", typical_kernel, 16, dtype, **filters, **shape
                )
            filters["TYPICAL"] = on
            yield _compilation(f"sample sums, {kind}", sum_kernel, 8, dtype, **filters, **shape)
            yield _compilation(
                f"sample token, {kind}", token_kernel, 8, dtype, DRAWN=True, **filters, **shape
            )


_TYPES = {
    "best": "*fp32", "place": "*i32", "temperature": "*fp64", "uniform": "*fp64",
    "top_k": "*fp64", "top_p": "*fp64", "min_p": "*fp64", "typical_p": "*fp64", "near": "*i32",
    "kth": "*i32", "least": "*i64", "sums": "*i64", "tokens": "*i64",
    "soundness": "*i1", "begin": "*i32", "token": "*i32", "value": "*fp32", "V": "i32",
    "splits": "i32", "stride_row": "i32",
}  # fmt: skip


def _compilation(
    name: str, kernel: Any, warps: int, dtype: str, **constants: int | bool
) -> Compilation:
    types = {"logits": f"*{dtype}", **_TYPES}
    signature = {arg: types[arg] for arg in kernel.arg_names if arg not in constants}
    return Compilation(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=warps,
        num_stages=1,
        divisible_by_16=tuple(arg for arg in ("V", "stride_row") if arg in signature),
        options={"enable_fp_fusion": False},
    )
