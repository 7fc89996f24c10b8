"""Triton version of draft_logits; see draft_logits.py.

A program computes some tokens of one segment's rows, ROWS at a time: the tokens' rows of the LM
head come from memory once; with more rows than ROWS, again from the second-level cache. ROWS is the
same for any number of rows, so that the order of a sum is too.
"""

from __future__ import annotations

from collections.abc import Iterator

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

ROWS = 16  # the least that a tensor core's product takes
_COLUMNS = 32


@fixed_kernel
def draft_logits_kernel(
    # pointers
    h,  # [I, H]
    weight,  # [V, H]
    bias,  # [V]; None without BIAS
    vocabulary,  # int32 [S]
    segments,  # int32 [R, 4]
    out,  # [I, width]
    # sizes
    H,
    # strides
    stride_h,
    stride_w,
    width,
    # meta
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # H is a multiple of DEPTH
    NARROW: tl.constexpr,  # products in the operands' own 16 bits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (block of columns, segment)."""
    segment = tl.program_id(1)
    begin = tl.load(segments + 4 * segment)
    end = tl.load(segments + 4 * segment + 1)
    if begin < end:
        first = tl.load(segments + 4 * segment + 2)
        last = tl.load(segments + 4 * segment + 3)
        j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        inside = first + j < last
        token = tl.load(vocabulary + first + j, mask=inside, other=0).to(tl.int64)
        H = wide_size(H, weight, ALIGNED)
        heads = wide_row(weight, token * stride_w, ALIGNED)
        weights = heads[:, None] + k[None, :]  # [COLUMNS, DEPTH]
        for start in range(begin, end, ROWS):
            i = (start + tl.arange(0, ROWS)).to(tl.int64)
            live = i < end
            own = wide_row(h, i * stride_h, ALIGNED)
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for done in range(0, H, DEPTH):
                a_kept, w_kept = live[:, None], inside[:, None]
                if not EVEN:
                    left = (done + k < H)[None, :]
                    a_kept, w_kept = a_kept & left, w_kept & left
                a = tl.load(own[:, None] + done + k[None, :], mask=a_kept, other=0.0)
                w = tl.load(weights + done, mask=w_kept, other=0.0)  # stream
                if not NARROW:
                    a = a.to(tl.float32)
                    w = w.to(tl.float32)
                sums = tl.dot(a, tl.trans(w), sums, input_precision="ieee")
            if BIAS:
                sums += tl.load(bias + token, mask=inside, other=0.0).to(tl.float32)[None, :]
            y = tl.where(inside[None, :], sums, float("-inf"))
            tl.store(
                out + i[:, None] * width + j[None, :], y, mask=live[:, None] & (j < width)[None, :]
            )


def launch_draft_logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: Tensor,
    segments: Tensor,
    width: int,
) -> Tensor:
    """draft_logits; see draft_logits.py."""
    out = torch.empty((h.shape[0], width), dtype=torch.float32, device=h.device)
    if out.numel() and segments.shape[0]:
        config = _config(h.shape[1], h.dtype, weight.dtype, bias is not None, aligned(h, weight))
        draft_logits_kernel[(triton.cdiv(width, _COLUMNS), segments.shape[0])](
            h, weight, bias, vocabulary, segments, out,
            h.shape[1], h.stride(0), weight.stride(0), width, **config.keywords,
        )  # fmt: skip
    return out


def _config(
    features: int, dtype: torch.dtype, weight: torch.dtype, bias: bool, wide: bool
) -> LaunchConfig:
    narrow = dtype == weight and dtype.itemsize == 2
    depth = min(256 if narrow else 64, max(16, triton.next_power_of_2(features)))
    constants = {
        "BIAS": bias,
        "ALIGNED": wide,
        "EVEN": features % depth == 0,
        "NARROW": narrow,
        "ROWS": ROWS,
        "COLUMNS": _COLUMNS,
        "DEPTH": depth,
    }
    return LaunchConfig(constants, num_warps=4, num_stages=2)


def compilations_for(
    features: int,
    dtype: torch.dtype,
    weight: torch.dtype,
    *,
    bias: bool = False,
    wide: bool | None = None,
) -> Iterator[Compilation]:
    """All that draft_logits launches over one LM head. dtype: that of h.

    wide: `aligned` of h and weight; None: as rows of so many features are.
    """
    if wide is None:
        wide = all(features * each.itemsize % WIDE == 0 for each in (dtype, weight))
    head = pointer(weight)
    odd = ("" if wide else ", odd") + (", bias" if bias else "")
    yield _config(features, dtype, weight, bias, wide).compilation(
        f"draft_logits, {features} features{odd}, h {pointer(dtype)[1:]}, weight {head[1:]}",
        draft_logits_kernel,
        {
            "h": pointer(dtype),
            "weight": head,
            "bias": head if bias else None,
            "vocabulary": "*i32",
            "segments": "*i32",
            "out": "*fp32",
            "H": "i32",
            "stride_h": "i32",
            "stride_w": "i32",
            "width": "i32",
        },
        products=dtype == weight and dtype.itemsize == 2,
    )


def compilations() -> Iterator[Compilation]:
    """Configurations for LM heads: Llama-3.1-8B's and SmolLM2-135M's."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from compilations_for(4096, dtype, dtype)
    yield from compilations_for(576, torch.bfloat16, torch.bfloat16)
    yield from compilations_for(576, torch.float32, torch.float32)
    yield from compilations_for(4096, torch.float32, torch.bfloat16)
