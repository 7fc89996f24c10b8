"""Kernel cases: each operation on given shapes, with its reference and its rival in torch.

For checks the shapes are small and odd, for timings those of Llama-3.1-8B. Needs nothing but the
kernels and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels.attention.kv_write import kv_write_, plain_kv_write_, reference_kv_write
from quickchange_kernels.attention.paged_attention_contract import (
    paged_attention,
    reference_paged_attention,
)
from quickchange_kernels.elementwise.rms_norm import (
    add_rms_norm,
    plain_add_rms_norm,
    reference_add_rms_norm,
)
from quickchange_kernels.elementwise.rotary import plain_rotary_, reference_rotary, rotary_
from quickchange_kernels.elementwise.silu_mul import plain_silu_mul, reference_silu_mul, silu_mul
from quickchange_kernels.linear.linear_float import linear
from quickchange_kernels.lowrank.lowrank_contract import lowrank_, reference_lowrank
from quickchange_kernels.random_inputs import make_segments, random_keys, random_tables
from quickchange_kernels.sampling.sample_contract import Draws, sample
from quickchange_kernels.sampling.sample_plain import plain_sample
from quickchange_kernels.sampling.verify import plain_verify, reference_verify, verify
from quickchange_kernels.turbo_heads.draft_logits import draft_logits, reference_draft_logits
from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    HeadItems,
    HeadTables,
    in_pages,
    page_elements,
    reference_turbo_heads,
    turbo_heads,
)
from quickchange_server.model.input_buffers import layout_of, rebuilt

Tree = TypeVar("Tree")

BLOCK_SIZE = 16
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One operation on one shape, with the least bytes and operations that it needs."""

    name: str
    run: Callable[[], object]
    outputs: Callable[[], tuple[Tensor, Tensor]]  # one run on fresh data, and the same in float64
    rival: str  # name of `rival_run`
    rival_run: Callable[[], object]
    bytes: int
    operations: int


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """Device, precision and random numbers of the cases."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator  # the CPU's: the same numbers everywhere

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def moved(self, tree: Tree) -> Tree:
        """Move a dataclass of tensors to the device."""
        layout, tensors = layout_of(tree)
        return rebuilt(layout, [tensor.to(self.device) for tensor in tensors])


def linear_case(bench: DeviceSetup, rows: int, features: int, width: int) -> GpuCase:
    """The base's matrix product, the yardstick of every low-rank update."""
    x, weight = bench.randn(rows, features), bench.randn(width, features) * features**-0.5
    return GpuCase(
        f"linear {features} to {width}, {rows} rows",
        lambda: linear(x, weight),
        lambda: (linear(x, weight), x.double() @ weight.double().T),
        "F.linear",
        lambda: F.linear(x, weight),
        weight.nbytes + x.nbytes + rows * width * x.itemsize,
        2 * rows * features * width,
    )


def lowrank_case(
    bench: DeviceSetup, rows: int, ranks: Sequence[int], features: int, widths: Sequence[int]
) -> GpuCase:
    """Low-rank updates of `rows` rows, in equal parts under adapters of the given ranks."""
    tables = bench.moved(random_tables(features, widths, ranks, bench.generator, dtype=bench.dtype))
    count = len(ranks)
    edges = [rows * i // count for i in range(count + 1)]
    spans = [(edges[i], edges[i + 1], i, 1.0) for i in range(count)]
    segments = bench.moved(make_segments(spans))
    x, y = bench.randn(rows, features), bench.randn(rows, sum(widths))
    rank, width = max(ranks), sum(widths)
    # Best of torch without custom kernels: all adapters in one tensor, gathered by row
    a = bench.randn(count, features, rank * len(widths))
    b = bench.randn(count, rank, width)
    slot = torch.tensor([i for i in range(count) for _ in range(edges[i], edges[i + 1])])
    slot = slot.to(bench.device)

    def outputs() -> tuple[Tensor, Tensor]:
        fresh = y.clone()
        expected = reference_lowrank(fresh, x, tables, segments, 0)
        lowrank_(fresh, x, tables, segments, 0)
        return fresh, expected

    def by_bmm() -> Tensor:
        h = torch.bmm(x.unsqueeze(1), a[slot])[:, :, :rank]
        return y + torch.bmm(h, b[slot]).squeeze(1)

    padded = sum(-(-rank // 8) * 8 for rank in ranks)
    weights = padded * sum(features + width for width in widths) * y.itemsize
    return GpuCase(
        f"lowrank {features} to {'+'.join(map(str, widths))}, {rows} rows, {count} adapters of "
        f"rank {'/'.join(str(rank) for rank in sorted(set(ranks)))}",
        lambda: lowrank_(y, x, tables, segments, 0),
        outputs,
        "gather and bmm",
        by_bmm,
        weights + x.nbytes + 2 * y.nbytes,
        2 * rows * rank * sum(features + width for width in widths),
    )


def attention_case(
    bench: DeviceSetup,
    sequences: int,
    keys: int,
    queries: int,
    heads: int,
    kv_heads: int,
    size: int,
) -> GpuCase:
    """Attention of the last `queries` rows of each sequence over its context."""
    lengths = [max(keys - 3 * i, queries) for i in range(sequences)]
    cache = bench.moved(
        random_keys(lengths, kv_heads, size, BLOCK_SIZE, bench.generator, bench.dtype)
    )
    q = bench.randn(sequences * queries, heads, size)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=bench.device) * queries
    arguments = (
        q,
        cache.k_cache,
        cache.v_cache,
        cache.block_tables,
        cache.seq_lens,
        starts,
        size**-0.5,
    )
    k, v = (bench.randn(sequences, kv_heads, keys, size) for _ in range(2))
    grouped = q.view(sequences, queries, heads, size).transpose(1, 2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=bench.device).tril(keys - queries)
    return GpuCase(
        f"attention, {sequences} sequences of {keys} keys, {queries} queries each",
        lambda: paged_attention(*arguments),
        lambda: (paged_attention(*arguments), reference_paged_attention(*arguments)),
        "SDPA on contiguous keys",
        lambda: F.scaled_dot_product_attention(
            grouped, k, v, attn_mask=None if queries == 1 else mask, enable_gqa=True
        ),
        2 * sum(lengths) * kv_heads * size * q.itemsize + 2 * q.nbytes,
        4 * sum(lengths) * queries * heads * size,
    )


def kv_write_case(bench: DeviceSetup, rows: int, kv_heads: int, size: int) -> GpuCase:
    """Write of one layer's keys and values into shuffled slots."""
    blocks = rows // BLOCK_SIZE + 2
    shape = (blocks, kv_heads, BLOCK_SIZE, size)
    k_cache, v_cache = bench.randn(*shape), bench.randn(*shape)
    k, v = bench.randn(rows, kv_heads, size), bench.randn(rows, kv_heads, size)
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=bench.generator)[:rows].to(bench.device)

    def outputs() -> tuple[Tensor, Tensor]:
        expected = torch.stack(reference_kv_write(k, v, k_cache, v_cache, slots)).double()
        fresh_k, fresh_v = k_cache.clone(), v_cache.clone()
        kv_write_(k, v, fresh_k, fresh_v, slots)
        return torch.stack([fresh_k, fresh_v]), expected

    return GpuCase(
        f"kv_write, {rows} rows",
        lambda: kv_write_(k, v, k_cache, v_cache, slots),
        outputs,
        "index_put",
        lambda: plain_kv_write_(k, v, k_cache, v_cache, slots),
        4 * k.nbytes,
        0,
    )


def rows_cases(
    bench: DeviceSetup, rows: int, hidden: int, inner: int, heads: int
) -> Iterator[GpuCase]:
    """Row-wise operations: norm with the residual sum, gated activation, rotary embedding."""
    x, residual, weight = bench.randn(rows, hidden), bench.randn(rows, hidden), bench.randn(hidden)
    wide = bench.randn(rows, 2 * inner)
    size = hidden // heads
    q, k = bench.randn(rows, heads, size), bench.randn(rows, heads, size)
    angle = torch.rand(rows, size // 2, generator=bench.generator).repeat(1, 2)
    cos, sin = angle.cos().to(q), angle.sin().to(q)

    def rotated() -> tuple[Tensor, Tensor]:
        fresh = q.clone()
        rotary_(fresh, k.clone(), cos, sin)
        return fresh, reference_rotary(q, cos, sin)

    yield GpuCase(
        f"add_rms_norm {hidden}, {rows} rows",
        lambda: add_rms_norm(x, residual, weight, EPS, 0.0),
        lambda: (
            add_rms_norm(x, residual, weight, EPS, 0.0)[1],
            reference_add_rms_norm(x, residual, weight, EPS, 0.0)[1],
        ),
        "plain torch",
        lambda: plain_add_rms_norm(x, residual, weight, EPS, 0.0),
        4 * x.nbytes,
        0,
    )
    yield GpuCase(
        f"silu_mul {inner}, {rows} rows",
        lambda: silu_mul(wide),
        lambda: (silu_mul(wide), reference_silu_mul(wide)),
        "plain torch",
        lambda: plain_silu_mul(wide),
        wide.nbytes * 3 // 2,
        0,
    )
    yield GpuCase(
        f"rotary {heads} heads of {size}, {rows} rows",
        lambda: rotary_(q, k, cos, sin),
        rotated,
        "plain torch",
        lambda: plain_rotary_(q, k, cos, sin),
        4 * q.nbytes,
        0,
    )


def sample_case(bench: DeviceSetup, rows: int, vocabulary: int) -> GpuCase:
    """Sampling with temperature and top_p. The CPU's plain version is the reference, as tokens
    are the same on every device: 1 for each row that equals it."""
    logits = bench.randn(rows, vocabulary) * 3
    draws = Draws(
        temperature=torch.full((rows,), 0.8, dtype=torch.float64),
        uniform=torch.rand(rows, dtype=torch.float64, generator=bench.generator),
        top_p=torch.full((rows,), 0.9, dtype=torch.float64),
    )
    there = bench.moved(draws)

    def outputs() -> tuple[Tensor, Tensor]:
        tokens = sample(logits.clone(), there).tokens.cpu()
        expected, _ = plain_sample(
            logits.cpu(), draws.temperature, draws.uniform, draws.filters, *[None] * 3
        )
        return (tokens == expected).double(), torch.ones(rows, dtype=torch.float64)

    def by_sorting() -> Tensor:
        ordered, order = torch.softmax(logits.float() / 0.8, dim=-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered > 0.9
        return order.gather(1, torch.multinomial(ordered.masked_fill(outside, 0.0), 1))

    return GpuCase(
        f"sample from {vocabulary}, {rows} rows",
        lambda: sample(logits, there),
        outputs,
        "sort and multinomial",
        by_sorting,
        logits.nbytes,
        0,
    )


def turbo_case(bench: DeviceSetup, rows: int, heads: int, width: int) -> GpuCase:
    """Turbo heads: every row through all heads of one adapter."""
    weights = [bench.randn(width, width) * width**-0.5 for _ in range(heads)]
    biases = [bench.randn(width) for _ in range(heads)]
    held = [in_pages(*head) for head in zip(weights, biases, strict=True)]
    pages = len(held[0])
    unit = -(-page_elements(width) // 32) * 32  # every page begins at a multiple of 64 bytes
    arena = F.pad(torch.cat(held), (0, unit - page_elements(width))).flatten()
    edges = torch.arange(heads + 1, dtype=torch.int32, device=bench.device) * pages
    tables = HeadTables(
        arena,
        torch.arange(heads * pages, device=bench.device) * unit,
        torch.stack([edges[:-1], edges[1:]], dim=1),
    )
    items = HeadItems.of([(row, head) for row in range(rows) for head in range(heads)])
    there = items.to(bench.device)
    x = bench.randn(rows, width)
    return GpuCase(
        f"turbo_heads {width}, {rows} rows, {heads} heads",
        lambda: turbo_heads(x, x, tables, there),
        lambda: (turbo_heads(x, x, tables, there), reference_turbo_heads(x, x, tables, items)),
        "F.linear a head",
        lambda: [x + F.silu(F.linear(x, *w)) for w in zip(weights, biases, strict=True)],
        heads * (weights[0].nbytes + biases[0].nbytes) + x.nbytes * (1 + heads),
        2 * rows * heads * width * width,
    )


def draft_case(
    bench: DeviceSetup, rows: int, tokens: int, features: int, vocabulary: int
) -> GpuCase:
    """Draft logits of all rows over the same tokens of an LM head."""
    h, weight = bench.randn(rows, features), bench.randn(vocabulary, features)
    order = torch.randperm(vocabulary, generator=bench.generator)[:tokens].sort().values
    ids = order.int().to(bench.device)
    segments = torch.tensor([[0, rows, 0, tokens]], dtype=torch.int32, device=bench.device)
    arguments = (h, weight, ids, segments, tokens)
    return GpuCase(
        f"draft_logits {features} to {tokens} of {vocabulary}, {rows} rows",
        lambda: draft_logits(*arguments),
        lambda: (draft_logits(*arguments), reference_draft_logits(*arguments)),
        "gather and F.linear",
        lambda: F.linear(h, weight[ids]),
        tokens * features * weight.itemsize + h.nbytes + 4 * rows * tokens,
        2 * rows * tokens * features,
    )


def verify_case(bench: DeviceSetup, sequences: int, drafts: int) -> GpuCase:
    """Verification of draft chains of which about three in four hold: 1 for each right sequence."""
    longest = drafts + 1
    drafted = torch.randint(9, (sequences * longest,), generator=bench.generator)
    holds = torch.rand(drafted.shape, generator=bench.generator) < 0.75
    sampled = torch.where(holds, drafted.roll(-1), 9).to(bench.device)
    drafted = drafted.to(bench.device)
    begin = torch.arange(sequences, dtype=torch.int32, device=bench.device) * longest
    rows = torch.stack([begin, begin + longest], dim=1)

    def outputs() -> tuple[Tensor, Tensor]:
        found = verify(sampled, drafted, rows, longest)
        expected = reference_verify(sampled, drafted, rows, longest)
        pairs = zip(found.accepted.tolist(), found.token.tolist(), expected, strict=True)
        right = [(a, t) == (accepted, token) for a, t, (accepted, token, _) in pairs]
        return torch.tensor(right).double(), torch.ones(sequences, dtype=torch.float64)

    return GpuCase(
        f"verify {sequences} sequences of {drafts} drafts",
        lambda: verify(sampled, drafted, rows, longest),
        outputs,
        "plain torch",
        lambda: plain_verify(sampled, drafted, rows, longest),
        2 * sampled.nbytes,
        0,
    )


def small_cases(bench: DeviceSetup) -> Iterator[GpuCase]:
    """Cases of odd shapes, for checks."""
    yield linear_case(bench, 3, 40, 24)
    for ranks in ([4], [8, 16, 64], [0, 20, 1, 33]):
        yield lowrank_case(bench, 9, ranks, 72, [40, 16, 8])
    yield lowrank_case(bench, 150, [16, 64], 128, [96])
    for keys, queries in ((1, 1), (77, 1), (530, 1), (77, 13)):
        yield attention_case(bench, 3, keys, queries, 8, 2, 64)
    yield kv_write_case(bench, 21, 2, 64)
    yield sample_case(bench, 5, 1003)
    yield turbo_case(bench, 5, 3, 72)
    yield draft_case(bench, 5, 40, 72, 200)
    yield verify_case(bench, 7, 5)
    yield from rows_cases(bench, 5, 96, 56, 3)


def llama_cases(bench: DeviceSetup) -> Iterator[GpuCase]:
    """Cases of Llama-3.1-8B's shapes, for timings."""
    qkv, gate_up = (4096, (4096, 1024, 1024)), (4096, (14336, 14336))
    down = (14336, (4096,))
    for rows in (1, 16, 64):
        for features, widths in (qkv, gate_up, down):
            yield linear_case(bench, rows, features, sum(widths))
    for rows, count, rank in ((1, 1, 16), (16, 16, 16), (64, 64, 16), (64, 1, 16), (16, 16, 64)):
        for features, widths in (qkv, gate_up, down):
            yield lowrank_case(bench, rows, [rank] * count, features, widths)
    yield lowrank_case(bench, 2048, [16] * 4, *qkv)
    for sequences, keys, queries in ((1, 4096, 1), (16, 1024, 1), (64, 1024, 1), (1, 2048, 512)):
        yield attention_case(bench, sequences, keys, queries, 32, 8, 128)
    yield kv_write_case(bench, 64, 8, 128)
    yield sample_case(bench, 64, 128_256)
    yield turbo_case(bench, 16, 4, 4096)
    yield draft_case(bench, 64, 4096, 4096, 128_256)
    yield verify_case(bench, 64, 7)
    yield from rows_cases(bench, 64, 4096, 14336, 32)
