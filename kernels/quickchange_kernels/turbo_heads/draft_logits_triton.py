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

ROWS = 16  # the least that a tensor core's product takes
_COLUMNS, _WARPS, _STAGES = 32, 4, 2


@triton.jit
def draft_logits_kernel(
    # pointers
    h,  # [I, H]
    weight,  # [V, H]
    bias,  # [V]; not read without BIAS
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
        weights = weight + (token * stride_w)[:, None] + k[None, :]  # [COLUMNS, DEPTH]
        for start in range(begin, end, ROWS):
            i = (start + tl.arange(0, ROWS)).to(tl.int64)
            live = i < end
            own = h + i[:, None] * stride_h  # [ROWS, 1]
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for done in range(0, H, DEPTH):
                a_kept, w_kept = live[:, None], inside[:, None]
                if not EVEN:
                    left = (done + k < H)[None, :]
                    a_kept, w_kept = a_kept & left, w_kept & left
                a = tl.load(own + done + k[None, :], mask=a_kept, other=0.0)
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
        narrow = h.dtype == weight.dtype and h.dtype != torch.float32
        draft_logits_kernel[(triton.cdiv(width, _COLUMNS), segments.shape[0])](
            h, weight, weight if bias is None else bias, vocabulary, segments, out,
            h.shape[1], h.stride(0), weight.stride(0), width,
            **_constants(h.shape[1], narrow=narrow, bias=bias is not None),
            num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return out


def _constants(features: int, *, narrow: bool, bias: bool) -> dict[str, int | bool]:
    depth = min(256 if narrow else 64, max(16, triton.next_power_of_2(features)))
    return {
        "BIAS": bias,
        "EVEN": features % depth == 0,
        "NARROW": narrow,
        "ROWS": ROWS,
        "COLUMNS": _COLUMNS,
        "DEPTH": depth,
    }


def compilations() -> Iterator[Compilation]:
    """Configurations for LM heads: Llama-3.1-8B's in bfloat16, SmolLM2-135M's in float32 too."""
    for model, features, dtype in (
        ("Llama 8B", 4096, "*bf16"),
        ("SmolLM2", 576, "*bf16"),
        ("SmolLM2", 576, "*fp32"),
    ):
        narrow = dtype == "*bf16"
        yield Compilation(
            name=f"draft_logits, {model}, {dtype[1:]}",
            kernel=draft_logits_kernel,
            signature={
                "h": dtype, "weight": dtype, "bias": dtype,
                "vocabulary": "*i32", "segments": "*i32", "out": "*fp32", "H": "i32",
                "stride_h": "i32", "stride_w": "i32", "width": "i32",
            },
            constants=_constants(features, narrow=narrow, bias=False),
            num_warps=_WARPS,
            num_stages=_STAGES,
            divisible_by_16=("H", "stride_h", "stride_w"),
            products=narrow,
        )  # fmt: skip
