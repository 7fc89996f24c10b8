"""Triton version of verify; see verify.py. A program a sequence; all of its rows at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.compilation import Compilation


@triton.jit
def chain_kernel(
    sampled,  # int64 [T]
    drafted,  # int64 [T]
    rows,  # int32 [B, 2]
    accepted,  # int32 [B]
    token,  # int64 [B]
    path,  # int32 [B, longest]
    longest,
    NODES: tl.constexpr,
):
    b = tl.program_id(0)
    begin = tl.load(rows + 2 * b)
    end = tl.load(rows + 2 * b + 1)
    i = tl.arange(0, NODES)
    row = begin + i
    inner = (i > 0) & (row < end)
    above = tl.load(sampled + row - 1, mask=inner, other=0)
    draft = tl.load(drafted + row, mask=inner, other=0)
    length = tl.min(tl.where(inner & (draft == above), NODES, tl.where(i > 0, i, NODES)), 0)
    length = tl.where(begin < end, tl.minimum(length, end - begin), 0)
    tl.store(accepted + b, tl.maximum(length - 1, 0))
    last = tl.load(sampled + begin + length - 1, mask=length > 0, other=0)
    tl.store(token + b, last)
    tl.store(path + b.to(tl.int64) * longest + i, tl.where(i < length, row, -1), mask=i < longest)


@triton.jit
def tree_kernel(
    sampled,  # int64 [T]
    drafted,  # int64 [T]
    rows,  # int32 [B, 2]
    parent,  # int32 [T]
    accepted,  # int32 [B]
    token,  # int64 [B]
    path,  # int32 [B, longest]
    longest,
    NODES: tl.constexpr,
):
    b = tl.program_id(0)
    begin = tl.load(rows + 2 * b)
    end = tl.load(rows + 2 * b + 1)
    i = tl.arange(0, NODES)
    row = begin + i
    inner = (i > 0) & (row < end) & (i < longest)
    above = tl.load(parent + row, mask=inner, other=0)
    expected = tl.load(sampled + above, mask=inner, other=0)
    draft = tl.load(drafted + row, mask=inner, other=0)
    holds = inner & (draft == expected)
    # holds_from[i, j]: node i's draft holds if node j's does
    holds_from = holds[:, None] & ((above - begin)[:, None] == i[None, :])
    reached = ((i == 0) & (begin < end)).to(tl.int32)
    last = tl.full((), 0, tl.int32)
    depth = tl.full((), -1, tl.int32)
    first = tl.min(tl.where(reached > 0, i, NODES), 0)
    while first < NODES:
        last = first
        depth += 1
        reached = tl.max(tl.where(holds_from, reached[None, :], 0), 1)
        first = tl.min(tl.where(reached > 0, i, NODES), 0)
    tl.store(accepted + b, tl.maximum(depth, 0))
    tl.store(token + b, tl.load(sampled + begin + last, mask=depth >= 0, other=0))
    # back from the last node to the first
    line = tl.full((NODES,), -1, tl.int32)
    node = begin + last
    while depth >= 0:
        line = tl.where(i == depth, node, line)
        node = tl.load(parent + node, mask=depth > 0, other=0)
        depth -= 1
    tl.store(path + b.to(tl.int64) * longest + i, line, mask=i < longest)


def launch_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, parent: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """verify; see verify.py."""
    count = rows.shape[0]
    accepted = torch.empty(count, dtype=torch.int32, device=rows.device)
    token = torch.empty(count, dtype=torch.int64, device=rows.device)
    path = torch.empty(count, longest, dtype=torch.int32, device=rows.device)
    if count:
        meta = {"NODES": triton.next_power_of_2(longest), "num_warps": _warps(longest)}
        results = (accepted, token, path, longest)
        if parent is None:
            chain_kernel[(count,)](sampled, drafted, rows, *results, **meta)
        else:
            tree_kernel[(count,)](sampled, drafted, rows, parent, *results, **meta)
    return accepted, token, path


def _warps(longest: int) -> int:
    return 4 if longest > 32 else 1


def compilations() -> Iterator[Compilation]:
    """A short chain, and trees of 16, 64 and 128 nodes."""
    signature = {
        "sampled": "*i64", "drafted": "*i64", "rows": "*i32", "accepted": "*i32", "token": "*i64",
        "path": "*i32", "longest": "i32",
    }  # fmt: skip
    yield Compilation(
        name="verify chain of 8",
        kernel=chain_kernel,
        signature=signature,
        constants={"NODES": 8},
        num_warps=_warps(8),
        num_stages=1,
    )
    for nodes in (16, 64, 128):
        yield Compilation(
            name=f"verify tree of {nodes}",
            kernel=tree_kernel,
            signature={**signature, "parent": "*i32"},
            constants={"NODES": nodes},
            num_warps=_warps(nodes),
            num_stages=1,
        )
