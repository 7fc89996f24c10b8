"""Triton version of token_mask_; see token_mask.py. A program masks 2,048 tokens of one row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.launch_config import LaunchConfig, fixed_kernel, pointer

_WORDS = 64  # words of one program: 2,048 tokens
_CONFIG = LaunchConfig({"WORDS": _WORDS}, num_warps=4)


@fixed_kernel
def token_mask_kernel(
    # pointers
    logits,  # [R, V]
    rows,  # int64 [M]
    bits,  # int32 [M, words]
    # sizes
    vocabulary,
    words,
    # strides
    stride,
    # meta
    WORDS: tl.constexpr,
):
    """Program (mask, block of words)."""
    m = tl.program_id(0)
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    row = tl.load(rows + m)
    mask = tl.load(bits + m.to(tl.int64) * words + word, mask=word < words, other=-1)
    place = tl.arange(0, 32)
    banned = ((mask[:, None] >> place[None, :]) & 1) == 0
    token = word[:, None] * 32 + place[None, :]
    never = tl.full((WORDS, 32), float("-inf"), logits.dtype.element_ty)
    tl.store(logits + row * stride + token, never, mask=banned & (token < vocabulary))


def launch_token_mask_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """token_mask_; see token_mask.py."""
    count, words = bits.shape
    if count == 0:
        return
    token_mask_kernel[(count, triton.cdiv(words, _WORDS))](
        logits,
        rows,
        bits.contiguous(),
        logits.shape[1],
        words,
        logits.stride(0),
        **_CONFIG.keywords,
    )


def compilations_for(dtype: torch.dtype) -> Iterator[Compilation]:
    """All that token_mask_ launches for logits of one dtype."""
    types = {
        "logits": pointer(dtype), "rows": "*i64", "bits": "*i32", "vocabulary": "i32",
        "words": "i32", "stride": "i32",
    }  # fmt: skip
    yield _CONFIG.compilation(f"token_mask, {pointer(dtype)[1:]}", token_mask_kernel, types)


def compilations() -> Iterator[Compilation]:
    """Configurations for each dtype of logits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from compilations_for(dtype)
