"""The plain torch version of paged_attention, for any device.

All sequences with one query go in one batch; the others one at a time, through PyTorch's own
attention. In both the queries that share a key head (GQA) are laid along the query length, so that
keys and values are never repeated: 12.6 ms against 29.9 with `enable_gqa` at 16 rows of 129 keys,
30 layers, 2 cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels.index_checks import check_indices, check_ranges


@dataclass(frozen=True)
class _Scoring:
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None  # float32 [Hq]
    slopes: Tensor | None  # float32 [Hq]

    def weights(self, products: Tensor, hidden: Tensor, distance: Tensor) -> Tensor:
        """Weights of keys for queries, in float32.

        products: q·k [b, Hkv, group, queries, keys]. hidden, distance: whether a query sees a key,
        and the key's position minus the query's; both [b, queries, keys].
        """
        scores = products.float() * self.scale
        heads = scores.shape[1:3]
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores = scores + self.slopes.view(*heads, 1, 1) * distance[:, None, None]
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.view(*heads, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class _Cache:
    k: Tensor  # [num_blocks, Hkv, block_size, D]
    v: Tensor  # [num_blocks, Hkv, block_size, Dv]
    block_tables: Tensor  # int32 [B, M]

    def gather(
        self, sequences: Tensor, first: Tensor, lengths: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of some sequences, padded to whole blocks: [b, Hkv, keys, D or Dv].

        What lies before key `first` and from `lengths` on is arbitrary.
        """
        size = self.k.shape[2]
        table = self.block_tables[sequences, : -(-longest // size)].long()
        start = torch.arange(table.shape[1], device=table.device) * size
        dead = (start >= lengths.unsqueeze(1)) | (start + size <= first.unsqueeze(1))
        table = table.masked_fill(dead, 0)
        k, v = (c[table].transpose(1, 2).flatten(2, 3) for c in (self.k, self.v))
        return k, v


def plain_paged_attention(
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
    """paged_attention for any device; reads lengths on the host."""
    cache = _Cache(k_cache, v_cache, block_tables)
    scoring = _Scoring(scale, window, softcap, sinks, slopes)
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    lengths, starts = seq_lens.tolist(), query_start.tolist()
    _check(q, cache, lengths, starts, window)
    spans = zip(lengths, pairwise(starts), strict=True)
    counts = [end - begin if length > 0 else 0 for length, (begin, end) in spans]
    single = [b for b, count in enumerate(counts) if count == 1]
    if single:
        rows = torch.tensor([starts[b] for b in single], device=q.device)
        longest = max(lengths[b] for b in single)
        sequences = torch.tensor(single, device=q.device)
        out[rows] = _decode(q[rows], cache, sequences, seq_lens[sequences], longest, scoring)
    for b, count in enumerate(counts):
        if count > 1:
            chunk = slice(starts[b], starts[b + 1])
            sequence = torch.tensor([b], device=q.device)
            visible = _visible(count, lengths[b], scoring.window, q.device)
            first = lengths[b] - count + 1 - window if window > 0 else 0
            oldest = seq_lens.new_full((1,), first)
            k, v = cache.gather(sequence, oldest, seq_lens[sequence], lengths[b])
            out[chunk] = _prefill(q[chunk], k, v, visible, scoring)
    return out


def _check(q: Tensor, cache: _Cache, lengths: list[int], starts: list[int], window: int) -> None:
    """Raise ValueError or IndexError for queries, keys or blocks that are not there."""
    size, room = cache.k.shape[2], cache.block_tables.shape[1] * cache.k.shape[2]
    for b, (length, (begin, end)) in enumerate(zip(lengths, pairwise(starts), strict=True)):
        if length == 0:
            continue  # padding
        check_ranges("paged_attention: query_start", torch.tensor([[begin, end]]), q.shape[0])
        if not end - begin <= length <= room:
            raise ValueError(
                f"paged_attention: sequence {b} has {end - begin} queries and {length} keys; its "
                f"block table has room for {room}"
            )
        oldest = max(0, length - (end - begin) - window + 1) if window > 0 else 0
        seen = cache.block_tables[b, oldest // size : -(-length // size)]
        if begin < end:
            check_indices("paged_attention: block_tables", seen, cache.k.shape[0])


def _decode(
    q: Tensor, cache: _Cache, sequences: Tensor, lengths: Tensor, longest: int, scoring: _Scoring
) -> Tensor:
    """One query [Hq, D] for each of the sequences: [b, Hq, Dv]."""
    heads = cache.k.shape[1]
    first = lengths - scoring.window if scoring.window > 0 else torch.zeros_like(lengths)
    k, v = cache.gather(sequences, first, lengths, longest)
    key = torch.arange(k.shape[2], device=q.device)
    hidden = (key >= lengths.unsqueeze(1)) | (key < first.unsqueeze(1))  # [b, keys]
    v = v.masked_fill(hidden[:, None, :, None], 0)  # 0 · NaN would be NaN
    grouped = q.reshape(q.shape[0], heads, -1, q.shape[2])  # [b, Hkv, group, D]
    distance = key - (lengths.unsqueeze(1) - 1)
    products = (grouped @ k.transpose(2, 3)).unsqueeze(3)  # [b, Hkv, group, 1, keys]
    weights = scoring.weights(products, hidden[:, None], distance[:, None]).squeeze(3)
    out: Tensor = weights.to(v.dtype) @ v
    return out.flatten(1, 2)


def _visible(count: int, length: int, window: int, device: torch.device) -> Tensor:
    """Mask of the keys that each of the last `count` positions sees: bool [count, length]."""
    key = torch.arange(length, device=device)
    position = key[length - count :, None]
    visible = key <= position
    return visible & (key > position - window) if window > 0 else visible


def _prefill(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scoring: _Scoring) -> Tensor:
    """Several queries [n, Hq, D] of one sequence, over [1, Hkv, at least keys, D]: [n, Hq, Dv].

    visible: bool [n, keys].
    """
    count, length = visible.shape
    heads = k.shape[1]
    group = q.shape[1] // heads
    k, v = k[:, :, :length], v[:, :, :length]
    if scoring.window > 0:
        # 0 · NaN would be NaN; so would a score with PyTorch's own attention, which adds its mask.
        used = visible.any(0)[:, None]
        k, v = k.where(used, 0), v.where(used, 0)
    grouped = q.reshape(count, heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
    if scoring.softcap > 0 or scoring.sinks is not None or scoring.slopes is not None:
        products = (grouped @ k.transpose(2, 3)).view(1, heads, group, count, length)
        key = torch.arange(length, device=q.device)
        distance = key - key[length - count :, None]
        weights = scoring.weights(products, ~visible[None], distance[None]).flatten(2, 3)
        out = weights.to(v.dtype) @ v
    else:
        mask = visible.repeat(group, 1)  # [group * n, keys]
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scoring.scale)
    return out.view(heads, group, count, -1).permute(2, 0, 1, 3).flatten(1, 2)
