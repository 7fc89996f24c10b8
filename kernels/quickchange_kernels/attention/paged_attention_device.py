"""Triton kernels of paged_attention: one for decode, verification and prefill, one to merge.

A program takes one tile of query rows of one sequence, one key head and some splits of the keys.
The query heads that share the key head lie along the tile's rows, so that keys and values are read
once for all of them. The grid follows from shapes alone: which sequence a tile belongs to is
searched in query_start on the device, and programs with nothing to do leave at once. How many
programs share a sequence's splits changes nothing in what is computed for each split.

Partial results stand one after another by sequence, row and split; where a sequence's begin follows
from its number and its first row (`_partials_of`), so no table of them is needed.

Online softmax in base 2 as in FlashAttention (Dao, 2022), splits as in Flash-Decoding (Dao et al.,
2023). No size and no scalar is specialised on, so that each set of constants is compiled once.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def _splits_of(
    length, count, window, split_keys, most_splits, room, GRAIN: tl.constexpr, WINDOW: tl.constexpr
):
    """First key, keys of a split and number of splits of a sequence with `count` queries."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - count - window + 1, 0) // GRAIN * GRAIN
    limit = tl.maximum(tl.minimum(most_splits, room // count), 1)
    each = tl.maximum(split_keys, tl.cdiv(length - first, limit * GRAIN) * GRAIN)
    return first, each, tl.cdiv(length - first, each)


@triton.jit
def _partials_of(b, start, most_splits, room):
    """The place of a sequence's first partial result.

    A sequence has room for at least its queries times its splits up to the next one's place: that
    product is at most `room`, and at most queries · most_splits.
    """
    return tl.minimum(start.to(tl.int64) * most_splits, b.to(tl.int64) * room)


@triton.jit
def _attend_keys(
    queries,
    queries_rest,  # None without BLOCK_REST
    k_cache,
    v_cache,
    table,
    position,
    slope,  # in base 2; None without slopes
    head,
    begin,
    stop,
    oldest,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Maxima in base 2, sums, and values times weights of a tile's rows over keys begin to stop."""
    d = tl.arange(0, BLOCK_D)
    in_key = d < D
    dv = tl.arange(0, BLOCK_DV)
    in_value = dv < DV
    if BLOCK_REST:
        rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        in_rest = rest < D
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_DV), tl.float32)
    lanes = tl.arange(0, BLOCK_KEYS)
    for first in range(begin, stop, BLOCK_KEYS):
        key = first + lanes
        inside = key < stop
        if WINDOW:
            inside &= key >= oldest
        page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
        slot = (page * KV_HEADS + head) * PAGE + key % PAGE
        at = slot[:, None] * D + d[None, :]
        k = tl.load(k_cache + at, mask=inside[:, None] & in_key[None, :], other=0.0)  # stream
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if BLOCK_REST:
            at = slot[:, None] * D + rest[None, :]
            mask = inside[:, None] & in_rest[None, :]
            # No stream: on CDNA's wide warps a tile of few columns is less than 16 bytes a thread.
            k_rest = tl.load(k_cache + at, mask=mask, other=0.0)
            scores = tl.dot(queries_rest, tl.trans(k_rest), scores, input_precision="ieee")
        if SOFTCAP:  # c · tanh(s / c), and tanh(z) = 1 - 2 / (e^(2z) + 1)
            power = tl.exp2(tl.minimum(scores * (2 * LOG2_E * scale / softcap), 64.0))
            scores = LOG2_E * softcap * (1 - 2 / (power + 1))
        else:
            scores = scores * (scale * LOG2_E)
        if slope is not None:
            scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        at = slot[:, None] * DV + dv[None, :]
        v = tl.load(v_cache + at, mask=inside[:, None] & in_value[None, :], other=0.0)  # stream
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


_VARYING = ("sequences", "least", "most", "split_keys", "most_splits", "room", "window")


@triton.jit(
    do_not_specialize=[*_VARYING, "scale", "softcap", "q_row", "q_head", "table_row"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "query_start", "sinks", "slopes"],
)
def paged_attention_kernel(
    # pointers
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start,
    sinks,  # float32 [Hq], or None; with SPLIT None, since they are counted where splits are merged
    slopes,  # float32 [Hq], or None
    out,  # [T, Hq, DV]; with SPLIT float32 [partials, Hq, DV], not yet divided by the sums
    stats,  # with SPLIT float32 [partials, Hq, 2]: maxima in base 2, sums; else None
    # sizes
    sequences,
    least,  # queries of the sequences that this launch takes
    most,
    split_keys,
    most_splits,
    room,  # partial results of a sequence
    window,
    # scalars
    scale,
    softcap,
    # strides
    q_row,  # in units of ALIGN elements
    q_head,
    table_row,
    # meta
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of D; BLOCK_REST, if not 0, of the columns behind it
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (tile, key head, n): a tile of rows over its keys, or every so many'th split."""
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = _sequence_of(query_start, tile, sequences, TOKENS, 1)
    if b < 0:
        return
    start = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - start
    length = tl.load(seq_lens + b)
    first_token = (tile - (start // TOKENS + b)) * TOKENS
    if (first_token >= count) | (count < least) | (count > most) | (length <= 0):
        return

    # The keys, from the oldest that the window shows to the newest that a row of the tile sees.
    # Blocks of keys lie at multiples of their size, wherever the queries are.
    past = length - count
    stop = past + tl.minimum(first_token + TOKENS, count)
    oldest = tl.maximum(past + first_token - window + 1, 0)
    begin = 0
    if WINDOW:
        begin = oldest // BLOCK_KEYS * BLOCK_KEYS
    if SPLIT:
        first_key, each, splits = _splits_of(
            length, count, window, split_keys, most_splits, room, GRAIN, WINDOW
        )
        first_split = (begin - first_key) // each + tl.program_id(2)
        end_split = tl.cdiv(stop - first_key, each)
        if first_split >= end_split:
            return

    rows = tl.arange(0, BLOCK_ROWS)
    token = first_token + rows // GROUP
    query_head = head * GROUP + rows % GROUP
    live = (rows < TOKENS * GROUP) & (token < count)
    d = tl.arange(0, BLOCK_D)
    row = (start + token).to(tl.int64)
    q_at = (row[:, None] * q_row + query_head[:, None] * q_head) * ALIGN
    in_q = live[:, None] & (d < D)[None, :]
    queries = tl.load(q + (q_at + d[None, :]), mask=in_q, other=0.0)
    queries_rest = None
    if BLOCK_REST:
        rest = BLOCK_D + tl.arange(0, BLOCK_REST)
        rest_mask = live[:, None] & (rest < D)[None, :]
        queries_rest = tl.load(q + (q_at + rest[None, :]), mask=rest_mask, other=0.0)
    position = past + token
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + query_head, mask=live, other=0.0) * LOG2_E
    table = block_tables + b.to(tl.int64) * table_row
    dv = tl.arange(0, BLOCK_DV)
    in_out = live[:, None] & (dv < DV)[None, :]

    if SPLIT:
        place = _partials_of(b, start, most_splits, room) + token * splits
        for split in range(first_split, end_split, tl.num_programs(2)):
            split_begin = first_key + split * each
            top, total, acc = _attend_keys(
                queries, queries_rest, k_cache, v_cache, table, position, slope, head,
                tl.maximum(split_begin, begin), tl.minimum(split_begin + each, stop), oldest,
                window, scale, softcap, KV_HEADS, D, DV, PAGE, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D,
                BLOCK_REST, BLOCK_DV, WINDOW, SOFTCAP,
            )  # fmt: skip
            at = (place + split) * HEADS + query_head
            tl.store(stats + at * 2, top, mask=live)
            tl.store(stats + at * 2 + 1, total, mask=live)
            tl.store(out + at[:, None] * DV + dv[None, :], acc, mask=in_out)
    else:
        top, total, acc = _attend_keys(
            queries, queries_rest, k_cache, v_cache, table, position, slope, head, begin, stop,
            oldest, window, scale, softcap, KV_HEADS, D, DV, PAGE, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D,
            BLOCK_REST, BLOCK_DV, WINDOW, SOFTCAP,
        )  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + query_head, mask=live, other=0.0) * LOG2_E
            new_top = tl.maximum(top, sink)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.exp2(sink - new_top)
            acc *= shrink[:, None]
        acc = acc / tl.where(live, total, 1.0)[:, None]
        at = row * HEADS + query_head
        out_at = out + at[:, None] * DV + dv[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_out)


@triton.jit(
    do_not_specialize=[*_VARYING, "heads"],
    do_not_specialize_on_alignment=["seq_lens", "query_start", "sinks"],
)
def merge_splits_kernel(
    # pointers
    parts,  # float32 [partials, Hq, DV]
    stats,  # float32 [partials, Hq, 2]
    seq_lens,
    query_start,
    sinks,  # float32 [Hq], or None
    out,  # [T, Hq, DV]
    # sizes
    heads,
    sequences,
    least,
    most,
    split_keys,
    most_splits,
    room,
    window,
    # meta
    DV: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (row, n): every so many'th query head of a row, split after split, some at a time.

    The result is Σ over splits of 2^(maximum - highest) · part, over Σ of 2^(…) · sums.
    """
    row = tl.program_id(0)
    b = _sequence_of(query_start, row, sequences, 1, 0)
    if b < 0:
        return
    start = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - start
    length = tl.load(seq_lens + b)
    if (row >= start + count) | (count < least) | (count > most) | (length <= 0):
        return
    first_key, each, splits = _splits_of(
        length, count, window, split_keys, most_splits, room, GRAIN, WINDOW
    )
    # Only splits that the row's tile has written are read: those with keys that the row sees.
    position = length - count + row - start
    first_split = 0
    if WINDOW:
        first_split = (tl.maximum(position - window + 1, 0) - first_key) // each
    end_split = (position - first_key) // each + 1
    place = _partials_of(b, start, most_splits, room) + (row - start) * splits
    d = tl.arange(0, BLOCK_DV)
    lanes = tl.arange(0, BLOCK_SPLITS)
    for head in range(tl.program_id(1), heads, tl.num_programs(1)):
        highest = tl.full((), float("-inf"), tl.float32)
        whole = tl.full((), 0.0, tl.float32)
        if sinks is not None:
            highest = tl.load(sinks + head) * LOG2_E  # in base 2, as the maxima are
            whole = tl.full((), 1.0, tl.float32)
        merged = tl.zeros((BLOCK_DV,), tl.float32)
        for first in range(first_split, end_split, BLOCK_SPLITS):
            split = first + lanes
            written = split < end_split
            at = (place + split) * heads + head
            top = tl.load(stats + at * 2, mask=written, other=float("-inf"))
            total = tl.load(stats + at * 2 + 1, mask=written, other=0.0)
            new = tl.maximum(highest, tl.max(top, 0))
            factor = tl.exp2(top - new)
            shrink = tl.exp2(highest - new)
            part_at = parts + at[:, None] * DV + d[None, :]
            part = tl.load(part_at, mask=written[:, None] & (d < DV)[None, :], other=0.0)
            whole = whole * shrink + tl.sum(total * factor, 0)
            merged = merged * shrink + tl.sum(part * factor[:, None], 0)
            highest = new
        out_at = out + (row.to(tl.int64) * heads + head) * DV + d
        tl.store(out_at, (merged / whole).to(out.dtype.element_ty), mask=d < DV)
