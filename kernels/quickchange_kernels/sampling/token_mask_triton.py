"""Triton version of token_mask_; see token_mask.py. A program masks 2,048 tokens of one row."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation

_WORDS = 64  # words of one program: 2,048 tokens
_WARPS = 4


@triton.jit
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
        WORDS=_WORDS,
        num_warps=_WARPS,
    )


def compilations() -> Iterator[Compilation]:
    """Configurations for each dtype of logits."""
    for dtype in ("fp32", "bf16", "fp16"):
        yield Compilation(
            name=f"token_mask, {dtype}",
            kernel=token_mask_kernel,
            signature={
                "logits": f"*{dtype}",
                "rows": "*i64",
                "bits": "*i32",
                "vocabulary": "i32",
                "words": "i32",
                "stride": "i32",
            },
            constants={"WORDS": _WORDS},
            num_warps=_WARPS,
            num_stages=1,
        )
