"""Triton version of verify; see verify.py. One program takes all rows of a sequence at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation
from quickchange_kernels.launch_config import LaunchConfig, fixed_kernel
from quickchange_kernels.sampling.verify import MAX_ROWS

_FEW_ROWS = 32
_CONFIGS = (
    LaunchConfig({"ROWS": _FEW_ROWS}, num_warps=1),
    LaunchConfig({"ROWS": MAX_ROWS}, num_warps=4),
)


@fixed_kernel
def verify_kernel(
    # pointers
    sampled,  # int64 [T]
    drafted,  # int64 [T]
    rows,  # int32 [B, 2]
    accepted,  # int32 [B]
    token,  # int64 [B]
    path,  # int32 [B, longest]
    # sizes
    longest,
    # meta
    ROWS: tl.constexpr,
):
    """Program (sequence,)."""
    b = tl.program_id(0)
    begin = tl.load(rows + 2 * b)
    end = tl.load(rows + 2 * b + 1)
    i = tl.arange(0, ROWS)
    row = begin + i
    inner = (i > 0) & (row < end)
    above = tl.load(sampled + row - 1, mask=inner, other=0)
    draft = tl.load(drafted + row, mask=inner, other=0)
    length = tl.min(tl.where(inner & (draft == above), ROWS, tl.where(i > 0, i, ROWS)), 0)
    length = tl.where(begin < end, tl.minimum(length, end - begin), 0)
    tl.store(accepted + b, tl.maximum(length - 1, 0))
    last = tl.load(sampled + begin + length - 1, mask=length > 0, other=0)
    tl.store(token + b, last)
    tl.store(path + b.to(tl.int64) * longest + i, tl.where(i < length, row, -1), mask=i < longest)


def launch_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """verify; see verify.py."""
    count = rows.shape[0]
    accepted = torch.empty(count, dtype=torch.int32, device=rows.device)
    token = torch.empty(count, dtype=torch.int64, device=rows.device)
    path = torch.empty(count, longest, dtype=torch.int32, device=rows.device)
    if count:
        verify_kernel[(count,)](
            sampled,
            drafted,
            rows,
            accepted,
            token,
            path,
            longest,
            **_CONFIGS[longest > _FEW_ROWS].keywords,
        )
    return accepted, token, path


def compilations() -> Iterator[Compilation]:
    """All that verify launches: for sequences of a few rows, and of the most."""
    types = {
        "sampled": "*i64", "drafted": "*i64", "rows": "*i32", "accepted": "*i32", "token": "*i64",
        "path": "*i32", "longest": "i32",
    }  # fmt: skip
    for config in _CONFIGS:
        yield config.compilation(f"verify, {config.constants['ROWS']} rows", verify_kernel, types)
