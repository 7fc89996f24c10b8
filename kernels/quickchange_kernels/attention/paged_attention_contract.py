"""paged_attention: attention of this step's queries over a paged key/value cache.

Contract
    q             [T, Hq, D]  the step's queries, flattened over sequences; any strides
    k_cache       [num_blocks, Hkv, block_size, D]   contiguous, q's dtype; Hq % Hkv == 0
    v_cache       [num_blocks, Hkv, block_size, Dv]  contiguous, q's dtype
    block_tables  int32 [B, M]  the blocks of each sequence, in order
    seq_lens      int32 [B]     keys of each sequence, this step's included
    query_start   int32 [B + 1] sequence b owns rows query_start[b] : query_start[b + 1] of q
    scale         scores are q·k · scale
    window        w > 0: key j is visible to position p iff p - j < w; 0: no window
    softcap       c > 0: scores become c · tanh(scores / c); 0: none
    sinks         float32 [Hq], contiguous, or None: for each head one more score, whose key every
                  position sees and whose value is 0; no softcap, no slope
    slopes        float32 [Hq], contiguous, or None: slope · (j - p) is added to the score of key j
                  for position p, after scale and softcap (ALiBi)
    returns       [T, Hq, Dv]  new, contiguous, q's dtype; sums in float32
Query i of sequence b stands at position seq_lens[b] - q_len + i and sees keys 0 .. its position.
The step's own keys are in the cache already (`kv_write_`).

Padding: rows of q from query_start[B] on belong to no sequence, and a sequence of length 0 has
none whatever query_start says; their output is unspecified. A sequence may have no queries. Cache
slots beyond a sequence's keys, and entries of block_tables beyond its blocks, have no influence,
whatever they hold; with a window neither have those before every query's window. Rows, lengths and
blocks out of range raise IndexError or ValueError on a CPU; on a GPU they must not occur. Where
the native or the Triton version serves, a sequence's result does not depend on the others of its
batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.attention.paged_attention_plain import plain_paged_attention


def reference_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The operation in float64, one query at a time: [T, Hq, Dv]."""
    shape = (*q.shape[:2], v_cache.shape[3])
    out = torch.zeros(shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_cache.shape[1]
    starts = query_start.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        keys = _sequence(k_cache, block_tables[b], length).repeat_interleave(group, dim=1)
        values = _sequence(v_cache, block_tables[b], length).repeat_interleave(group, dim=1)
        count = starts[b + 1] - starts[b]
        for i in range(count if length > 0 else 0):
            row, stop = starts[b] + i, length - count + i + 1
            seen = slice(max(stop - window, 0) if window > 0 else 0, stop)
            scores = torch.einsum("hd,jhd->hj", q[row].double(), keys[seen]) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                distance = torch.arange(seen.start - stop + 1, 1, device=q.device)
                scores = scores + slopes.double()[:, None] * distance
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], -1)
            weights = scores.softmax(-1)[:, : stop - seen.start]
            out[row] = torch.einsum("hj,jhd->hd", weights, values[seen])
    return out


def _sequence(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """One sequence's keys or values in order, in float64: [length, Hkv, D]."""
    block_size = cache.shape[2]
    used = blocks[: -(-length // block_size)].long()
    return cache[used].transpose(1, 2).flatten(0, 1)[:length].double()


def _fake(q: Tensor, _keys: Tensor, v_cache: Tensor, *_: object) -> Tensor:
    return torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)


_paged_attention = dispatch.declare(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor seq_lens, Tensor query_start, float scale, int window=0, float softcap=0.0, "
    "Tensor? sinks=None, Tensor? slopes=None) -> Tensor",
    plain_paged_attention,
    _fake,
)
dispatch.triton_version(
    "paged_attention", "quickchange_kernels.attention.paged_attention_triton:launch_paged_attention"
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention of q over the cache, on q's device: [T, Hq, Dv]. Contract above."""
    native.ensure()
    out: Tensor = _paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start,
        scale,
        window,
        softcap,
        sinks,
        slopes,
    )
    return out
