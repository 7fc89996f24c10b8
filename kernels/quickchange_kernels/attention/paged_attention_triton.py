"""paged_attention on the GPU: one Triton kernel for decode, verification and prefill chunks.

A program takes one tile of query rows of one sequence, one key head and one split of the keys. The
query heads that share the key head lie along the tile's rows, so that keys and values are read once
for all of them. The grid follows from shapes alone: which sequence a tile belongs to is searched in
query_start on the device, and programs with nothing to do leave at once.

Sequences are handled by how many queries they have, each kind by a launch with tiles of its own, so
that a sequence's sums run in the same order whatever else is in the batch:

    few queries      tiles of 16 rows; the context cut in splits of fixed size, for decode
    up to 64         tiles of 64 rows; splits as above, for verification and short chunks
    more             tiles of up to 128 rows over the whole context, for prefill

A second kernel merges the splits. Online softmax in base 2 as in FlashAttention (Dao, 2022), splits
as in Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_kernels.attention.paged_attention_plain import plain_paged_attention
from quickchange_kernels.attention.paged_attention_tuning import (
    ANY_COUNT,
    AttentionLaunch,
    has_few_registers,
    kernel_constants,
    keys_per_split_for,
    launches_for,
    merge_constants,
)
from quickchange_kernels.compilation import TARGETS, Compilation


@triton.jit
def _sequence_of(query_start, tile, sequences, TOKENS: tl.constexpr, GAP: tl.constexpr):
    """The last sequence whose first tile, start // TOKENS + GAP · b, is at or before `tile`."""
    found = 0
    lanes = tl.arange(0, 128)
    for first in range(0, sequences, 128):
        b = first + lanes
        start = tl.load(query_start + b, mask=b < sequences, other=0)
        found += tl.sum(((b < sequences) & (start // TOKENS + GAP * b <= tile)).to(tl.int32))
    return found - 1


@triton.jit
def paged_attention_kernel(
    # pointers
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start,
    out,  # [T, Hq, D]; with SPLIT float32 [splits, T, Hq, D], not yet divided by the sums
    stats,  # with SPLIT float32 [2, splits, T, Hq]: maxima in base 2, sums; else None
    # sizes
    T,
    sequences,
    least,  # queries of the sequences that this launch takes
    most,
    keys_per_split,
    window,
    # scalars
    scale,
    softcap,
    # strides
    q_row,
    q_head,
    table_row,
    # meta
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (tile, key head, split): attention of a tile of query rows over its keys."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    b = _sequence_of(query_start, tile, sequences, TOKENS, 1)
    if b < 0:
        return
    start = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - start
    length = tl.load(seq_lens + b)
    first_token = (tile - (start // TOKENS + b)) * TOKENS
    if (first_token >= count) | (count < least) | (count > most):
        return

    # The keys, from the oldest that the window shows to the newest that a row of the tile sees.
    # Blocks of keys lie at multiples of their size, wherever the queries are.
    past = length - count
    stop = past + tl.minimum(first_token + TOKENS, count)
    oldest = tl.maximum(past + first_token - window + 1, 0)
    begin = split * keys_per_split
    stop = tl.minimum(stop, begin + keys_per_split)
    if WINDOW:
        begin = tl.maximum(begin, oldest // BLOCK_KEYS * BLOCK_KEYS)
    if begin >= stop:
        return

    rows = tl.arange(0, BLOCK_ROWS)
    token = first_token + rows // GROUP
    query_head = head * GROUP + rows % GROUP
    live = (rows < TOKENS * GROUP) & (token < count)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    row = (start + token).to(tl.int64)
    q_at = row[:, None] * q_row + query_head[:, None] * q_head + d[None, :]
    queries = tl.load(q + q_at, mask=live[:, None] & in_head[None, :], other=0.0)
    position = past + token

    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    lanes = tl.arange(0, BLOCK_KEYS)
    table = block_tables + b.to(tl.int64) * table_row
    for first in range(begin, stop, BLOCK_KEYS):
        key = first + lanes
        inside = key < stop
        if WINDOW:
            inside &= key >= oldest
        page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
        slot = (page * KV_HEADS + head) * PAGE + key % PAGE
        at = slot[:, None] * D + d[None, :]
        loaded = inside[:, None] & in_head[None, :]
        k = tl.load(k_cache + at, mask=loaded, other=0.0)  # stream
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:  # c · tanh(s / c), and tanh(z) = 1 - 2 / (e^(2z) + 1)
            power = tl.exp2(tl.minimum(scores * (2 * LOG2_E / softcap), 64.0))
            scores = softcap * (1 - 2 / (power + 1))
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen & inside[None, :], scores * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_cache + at, mask=loaded, other=0.0)  # stream
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    heads: tl.constexpr = KV_HEADS * GROUP
    if SPLIT:
        place = (split.to(tl.int64) * T + row) * heads + query_head
        tl.store(stats + place, top, mask=live)
        places = tl.num_programs(2).to(tl.int64) * T * heads
        tl.store(stats + places + place, total, mask=live)
    else:
        place = row * heads + query_head
        acc = acc / tl.where(live, total, 1.0)[:, None]
    out_at = out + place[:, None] * D + d[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & in_head[None, :])


@triton.jit
def merge_splits_kernel(
    # pointers
    parts,  # float32 [splits, T, Hq, D]
    stats,  # float32 [2, splits, T, Hq]
    seq_lens,
    query_start,
    out,  # [T, Hq, D]
    # sizes
    T,
    sequences,
    splits,
    least,
    most,
    keys_per_split,
    window,
    # meta
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (row, query head): Σ over splits of 2^(maximum - highest) · part, over Σ of sums."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = _sequence_of(query_start, row, sequences, 1, 0)
    if b < 0:
        return
    start = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - start
    if (row >= start + count) | (count < least) | (count > most):
        return
    # Only splits that the row's tile has written are read.
    past = tl.load(seq_lens + b) - count
    last = past + row - start
    oldest = last - window + 1
    if last < 0:
        return
    split = tl.arange(0, BLOCK_SPLITS)
    written = (split <= last // keys_per_split) & (split < splits)
    if WINDOW:
        written &= split >= tl.maximum(oldest, 0) // keys_per_split
    place = (split.to(tl.int64) * T + row) * HEADS + head
    top = tl.load(stats + place, mask=written, other=float("-inf"))
    total = tl.load(stats + splits.to(tl.int64) * T * HEADS + place, mask=written, other=0.0)
    factor = tl.exp2(top - tl.max(top, 0))
    d = tl.arange(0, BLOCK_D)
    at = parts + place[:, None] * D + d[None, :]
    part = tl.load(at, mask=written[:, None] & (d < D)[None, :], other=0.0)
    merged = tl.sum(part * factor[:, None], 0) / tl.sum(total * factor, 0)
    out_at = out + (row.to(tl.int64) * HEADS + head) * D + d
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=d < D)


def launch_paged_attention(
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
    """paged_attention; see paged_attention_contract.py.

    Dtypes other than float32, bfloat16 and float16 go to the plain version. Raises TypeError or
    ValueError on what does not fit together.
    """
    _check(q, k_cache, v_cache, block_tables, seq_lens, query_start)
    special = sinks is not None or slopes is not None or k_cache.shape != v_cache.shape
    if special or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return plain_paged_attention(
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
    keys = block_tables.shape[1] * k_cache.shape[2]
    call = Call(
        q if q.stride(2) == 1 else q.contiguous(),
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start,
        scale,
        max(window, 0),
        max(softcap, 0.0),
        keys_per_split_for(keys),
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k_cache.shape[1]
    if out.numel() > 0:
        few_registers = has_few_registers(q.device)
        for launch in launches_for(
            len(q), len(seq_lens), group, q.shape[2], q.itemsize, few_registers
        ):
            call.run(launch, out)
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
) -> None:
    for index in (block_tables, seq_lens, query_start):
        if index.dtype != torch.int32 or not index.is_contiguous():
            raise TypeError(
                "paged_attention: block_tables, seq_lens and query_start must be contiguous int32"
            )
    fits = (
        (q.dim(), k_cache.dim(), v_cache.dim(), block_tables.dim()) == (3, 4, 4, 2)
        and k_cache.shape[:3] == v_cache.shape[:3]
        and q.shape[2] == k_cache.shape[3]
        and q.shape[1] % k_cache.shape[1] == 0
        and query_start.numel() == seq_lens.numel() + 1 == block_tables.shape[0] + 1
    )
    if not fits:
        raise ValueError(
            f"paged_attention: q {list(q.shape)}, k_cache {list(k_cache.shape)}, v_cache "
            f"{list(v_cache.shape)}, block_tables {list(block_tables.shape)}, seq_lens "
            f"{list(seq_lens.shape)} and query_start {list(query_start.shape)} do not fit together"
        )
    if not (k_cache.dtype == v_cache.dtype == q.dtype):
        raise TypeError(
            f"paged_attention: q is {q.dtype}, but the caches {k_cache.dtype} and {v_cache.dtype}; "
            "they must be equal"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("paged_attention: k_cache and v_cache must be contiguous")


@dataclass(frozen=True)
class Call:
    """The operands of one call, as the kernels take them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float
    window: int
    softcap: float
    keys_per_split: int

    def run(self, launch: AttentionLaunch, out: Tensor) -> None:
        """Write the output of the launch's sequences, and of no others."""
        splits = self._splits() if launch.split else 1
        if splits == 1:
            self._attend(launch, out, None, 1)
            return
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
        stats = torch.empty((2, *parts.shape[:3]), dtype=torch.float32, device=out.device)
        self._attend(launch, parts, stats, splits)
        self._merge(launch, parts, stats, out)

    def _splits(self) -> int:
        keys = self.block_tables.shape[1] * self.k_cache.shape[2]
        return max(1, triton.cdiv(keys, self.keys_per_split))

    def _attend(
        self, launch: AttentionLaunch, out: Tensor, stats: Tensor | None, splits: int
    ) -> None:
        T, heads, dim = self.q.shape
        kv_heads, page = self.k_cache.shape[1:3]
        group, tiling = heads // kv_heads, launch.tiling
        tiles = T // (tiling.rows // group) + len(self.seq_lens)
        paged_attention_kernel[(tiles, kv_heads, splits)](
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start,
            out,
            stats,
            T,
            len(self.seq_lens),
            launch.least,
            launch.most,
            self.keys_per_split if splits > 1 else ANY_COUNT,
            self.window,
            self.scale,
            self.softcap,
            self.q.stride(0),
            self.q.stride(1),
            self.block_tables.stride(0),
            **kernel_constants(
                heads,
                kv_heads,
                dim,
                page,
                tiling,
                WINDOW=self.window > 0,
                SOFTCAP=self.softcap > 0,
                SPLIT=stats is not None,
            ),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            **({} if torch.version.hip else tiling.options),
        )

    def _merge(self, launch: AttentionLaunch, parts: Tensor, stats: Tensor, out: Tensor) -> None:
        splits, T, heads, dim = parts.shape
        merge_splits_kernel[(T, heads)](
            parts,
            stats,
            self.seq_lens,
            self.query_start,
            out,
            T,
            len(self.seq_lens),
            splits,
            launch.least,
            launch.most,
            self.keys_per_split,
            self.window,
            **merge_constants(heads, dim, splits, self.window > 0),
            num_warps=4,
        )


_ATTEND_SIGNATURE = {
    "q": "*bf16",
    "k_cache": "*bf16",
    "v_cache": "*bf16",
    "block_tables": "*i32",
    "seq_lens": "*i32",
    "query_start": "*i32",
    "out": "*bf16",
    "T": "i32",
    "sequences": "i32",
    "least": "i32",
    "most": "i32",
    "keys_per_split": "i32",
    "window": "i32",
    "scale": "fp32",
    "softcap": "fp32",
    "q_row": "i32",
    "q_head": "i32",
    "table_row": "i32",
}
_MERGE_SIGNATURE = {
    "parts": "*fp32",
    "stats": "*fp32",
    "seq_lens": "*i32",
    "query_start": "*i32",
    "out": "*bf16",
    "T": "i32",
    "sequences": "i32",
    "splits": "i32",
    "least": "i32",
    "most": "i32",
    "keys_per_split": "i32",
    "window": "i32",
}
# name: query heads, key heads, head size
_MODELS = {
    "Llama 8B": (32, 8, 128),
    "Llama 70B": (64, 8, 128),
    "SmolLM2": (9, 3, 64),
    "Gemma 2 9B": (16, 8, 256),
}
_FEW_REGISTERS = ("sm_80",)


def compilations() -> Iterator[Compilation]:
    """Configurations for decode, verification (up to 64 tokens), prefill and merging."""
    for model, shape in _MODELS.items():
        for few_registers in (False, True):
            yield from _attend_compilations(model, shape, few_registers)
        heads, _, dim = shape
        yield Compilation(
            name=f"attention merge, {model}",
            kernel=merge_splits_kernel,
            signature=_MERGE_SIGNATURE,
            constants=merge_constants(heads, dim, 16, window=False),
            num_warps=4,
            num_stages=2,
        )


def _attend_compilations(
    model: str, shape: tuple[int, int, int], few_registers: bool
) -> Iterator[Compilation]:
    heads, kv_heads, dim = shape
    targets = (
        _FEW_REGISTERS if few_registers else tuple(t for t in TARGETS if t not in _FEW_REGISTERS)
    )
    launches = launches_for(4096, 16, heads // kv_heads, dim, 2, few_registers)
    for kind, launch in zip(("decode", "verify", "prefill"), launches, strict=True):
        for window in (False, True):
            name = f"attention {kind}, {model}{', window' if window else ''}"
            suffix = ", few registers" if few_registers else ""
            yield _attend_compilation(name + suffix, shape, launch, window, targets)


def _attend_compilation(
    name: str,
    shape: tuple[int, int, int],
    launch: AttentionLaunch,
    window: bool,
    targets: tuple[str, ...],
) -> Compilation:
    # Models with heads of 256 cap their scores.
    switches = {"WINDOW": window, "SOFTCAP": shape[2] == 256, "SPLIT": launch.split}
    constants = kernel_constants(*shape, 16, launch.tiling, **switches)
    signature = dict(_ATTEND_SIGNATURE)
    if launch.split:
        signature |= {"out": "*fp32", "stats": "*fp32"}
    else:
        constants["stats"] = None
    return Compilation(
        name=name,
        kernel=paged_attention_kernel,
        signature=signature,
        constants=constants,
        num_warps=launch.tiling.num_warps,
        num_stages=launch.tiling.num_stages,
        divisible_by_16=("q_row", "q_head"),
        products=True,
        options=launch.tiling.options,
        targets=targets,
    )
