"""token_mask_: set the logits of tokens that may not follow to -inf, in the rows with a mask.

Contract
    logits  [R, V]  float32, bfloat16 or float16; rows contiguous (any row stride); written in place
    rows    int64 [M]  the rows that have a mask, each at most once, all in [0, R)
    bits    int32 [M, ceil(V / 32)]  bit i % 32 of word i // 32 of mask m is set where token i may
                    follow in row rows[m]; bits past V are not read. Contiguous
    returns nothing. Rows without a mask are not touched, nor are logits of tokens that may follow
Knows nothing of grammars.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.index_checks import check_indices

WORD = 32  # bits


def mask_words(vocabulary: int) -> int:
    """int32 words of one mask."""
    return -(-vocabulary // WORD)


def reference_token_mask(logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
    """Logits after the operation, as a new tensor, bit by bit on the host."""
    masked = logits.clone()
    for row, words in zip(rows.tolist(), bits.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not words[token // WORD] >> token % WORD & 1:
                masked[row, token] = float("-inf")
    return masked


def plain_token_mask_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """The operation in plain torch, for any device."""
    check_indices("token_mask_: rows", rows, logits.shape[0])
    value = torch.arange(256, device=bits.device)[:, None]
    clear = (
        value >> torch.arange(8, device=bits.device) & 1
    ) == 0  # [256, 8]: each octet's clear bits
    octets = bits.contiguous().view(torch.uint8)  # [M, 4 words]: words are little-endian
    banned = clear[octets.int()].flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill_(banned, float("-inf"))


_token_mask = dispatch.declare(
    "token_mask_",
    "(Tensor(a!) logits, Tensor rows, Tensor bits) -> ()",
    plain_token_mask_,
    dispatch.writes_in_place,
)
dispatch.triton_version(
    "token_mask_", "quickchange_kernels.sampling.token_mask_triton:launch_token_mask_"
)


def token_mask_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Mask the logits in place, on their device. Contract above; ValueError where it is broken."""
    fits = (
        logits.dim() == 2
        and logits.stride(1) == 1
        and rows.dtype == torch.int64
        and bits.dtype == torch.int32
        and rows.dim() == 1
        and bits.shape == (len(rows), mask_words(logits.shape[1]))
    )
    if not fits:
        raise ValueError(
            f"token_mask_: logits {list(logits.shape)}, rows {rows.dtype} {list(rows.shape)} and "
            f"bits {bits.dtype} {list(bits.shape)} must be [R, V] with contiguous rows, int64 [M] "
            "and int32 [M, ceil(V / 32)]"
        )
    native.ensure()
    _token_mask(logits, rows, bits)
