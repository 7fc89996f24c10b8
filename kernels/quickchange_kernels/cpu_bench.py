"""Times of the CPU operations on SmolLM2-135M's shapes: `python -m quickchange_kernels.cpu_bench`.

Prints the milliseconds that all layers of one step take, dispatched (native where built) and in
plain torch, beside the time that moving their bytes takes at the memory's measured speed. Each
layer has its own weights, so that nothing stays in the caches between layers. On a machine that
does other work, `--threads 1 --clock cpu` leaves out the time in which other processes had the
core; the wall clock means little there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_kernels import native
from quickchange_kernels.attention.paged_attention_contract import paged_attention
from quickchange_kernels.attention.paged_attention_plain import plain_paged_attention
from quickchange_kernels.linear.linear_float import plain_linear
from quickchange_kernels.linear.linear_int8 import linear_int8, plain_linear_int8, quantize_int8
from quickchange_kernels.linear.linear_panels import linear_panels, pack_panels
from quickchange_kernels.linear.linear_quantized import (
    PackedWeight,
    linear_quantized,
    pack_int4,
    pack_int8,
    plain_packed,
)
from quickchange_kernels.lowrank.lowrank_contract import lowrank_, operands
from quickchange_kernels.lowrank.lowrank_plain import plain_lowrank_
from quickchange_kernels.random_inputs import make_segments, random_keys, random_tables

LAYERS = 30
HIDDEN, INNER, VOCABULARY = 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
# (input features, widths of the members that share the input)
FUSED = [(HIDDEN, (576, 192, 192)), (HIDDEN, (576,)), (HIDDEN, (1536, 1536)), (INNER, (576,))]


@dataclass(frozen=True)
class CpuCase:
    """One line of the table."""

    name: str
    bytes_moved: int
    dispatched: Callable[[], None]
    plain: Callable[[], None]


@dataclass(frozen=True)
class CallTimer:
    """A clock, and how often a call is repeated."""

    clock: Callable[[], float]  # seconds
    repeat: int

    def measure(self, run: Callable[[], None]) -> tuple[float, float]:
        """(median, minimum) milliseconds of a call, after one to warm up."""
        run()
        times = []
        for _ in range(self.repeat):
            start = self.clock()
            run()
            times.append((self.clock() - start) * 1e3)
        return statistics.median(times), min(times)


def memory_speed(stopwatch: CallTimer) -> float:
    """Bytes a second of reading a large tensor."""
    values = torch.ones(64 * 2**20)  # 256 MiB, written: untouched pages would all be one page
    _, best = stopwatch.measure(lambda: _discard(values.sum()))
    return values.nbytes / best * 1e3


def _discard(_: Tensor) -> None:
    """Drop a result that is computed for its time alone."""


def linear_shapes(*, head: bool) -> list[tuple[int, int]]:
    """(out, in) of all linears of the model, with or without the LM head."""
    layers = [(sum(widths), k) for k, widths in FUSED] * LAYERS
    return [*layers, (VOCABULARY, HIDDEN)] if head else layers


def linear_cases(dtype: torch.dtype, rows: list[int], *, head: bool = True) -> Iterator[CpuCase]:
    """All linears as they are served, beside `F.linear` on rows; prefill leaves the head out."""
    weights = [torch.randn(shape).to(dtype) for shape in linear_shapes(head=head)]
    packed = [pack_panels(weight) for weight in weights]
    size = sum(weight.nbytes for weight in weights)
    for count in rows:
        inputs = {k: torch.randn(count, k).to(dtype) for k in (HIDDEN, INNER)}

        def served(inputs: dict[int, Tensor] = inputs) -> None:
            for panels, weight in zip(packed, weights, strict=True):
                linear_panels(inputs[weight.shape[1]], panels, weight.shape[0])

        def plain(inputs: dict[int, Tensor] = inputs) -> None:
            for weight in weights:
                plain_linear(inputs[weight.shape[1]], weight)

        yield CpuCase(
            f"linear {_name(dtype)}, {count} rows{'' if head else ', no LM head'}",
            size,
            served,
            plain,
        )


def onednn_cases(dtype: torch.dtype, rows: list[int], *, head: bool = True) -> Iterator[CpuCase]:
    """The same through oneDNN: weights packed for each number of rows, and as they are."""
    weights = [torch.randn(shape).to(dtype) for shape in linear_shapes(head=head)]
    size = sum(weight.nbytes for weight in weights)
    onednn = torch.ops.mkldnn._linear_pointwise
    for count in rows:
        inputs = {k: torch.randn(count, k).to(dtype) for k in (HIDDEN, INNER)}
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, count) for weight in weights]

        def run(
            chosen: list[Tensor], inputs: dict[int, Tensor] = inputs, like: list[Tensor] = weights
        ) -> None:
            for weight, shape in zip(chosen, like, strict=True):
                onednn(inputs[shape.shape[1]], weight, None, "none", [], "")

        yield CpuCase(
            f"oneDNN packed (plain: as is) {_name(dtype)}, {count} rows"
            f"{'' if head else ', no LM head'}",
            size,
            lambda run=run, packed=packed: run(packed),  # type: ignore[misc]
            lambda run=run: run(weights),  # type: ignore[misc]
        )


def int8_cases(dtype: torch.dtype, rows: list[int], *, head: bool = True) -> Iterator[CpuCase]:
    """All linears kept as int8, x in `dtype`; plain: `F.linear` on weights made anew."""
    weights = [quantize_int8(torch.randn(shape)) for shape in linear_shapes(head=head)]
    size = sum(weight.nbytes + scale.nbytes for weight, scale in weights)
    for count in rows:
        inputs = {k: torch.randn(count, k).to(dtype) for k in (HIDDEN, INNER)}

        def run(
            version: Callable[[Tensor, Tensor, Tensor], Tensor],
            inputs: dict[int, Tensor] = inputs,
        ) -> None:
            for weight, scale in weights:
                version(inputs[weight.shape[1]], weight, scale)

        yield CpuCase(
            f"linear int8 {_name(dtype)}, {count} rows{'' if head else ', no LM head'}",
            size,
            lambda run=run: run(linear_int8),  # type: ignore[misc]
            lambda run=run: run(plain_linear_int8),  # type: ignore[misc]
        )


def quantized_cases(dtype: torch.dtype, rows: list[int], *, head: bool = True) -> Iterator[CpuCase]:
    """All linears kept as int8 or int4 in panels, x quantised on the way."""
    for name, pack in (("int8 panels", pack_int8), ("int4 panels", pack_int4)):
        shapes = linear_shapes(head=head)
        weights = [(shape[1], pack(torch.randn(shape))) for shape in shapes]
        size = sum(packed.nbytes for _, packed in weights)
        for count in rows:
            inputs = {k: torch.randn(count, k).to(dtype) for k in (HIDDEN, INNER)}

            def run(
                version: Callable[[Tensor, PackedWeight], Tensor],
                inputs: dict[int, Tensor] = inputs,
                weights: list[tuple[int, PackedWeight]] = weights,
            ) -> None:
                for k, packed in weights:
                    version(inputs[k], packed)

            yield CpuCase(
                f"linear {name} {_name(dtype)}, {count} rows{'' if head else ', no LM head'}",
                size,
                lambda run=run: run(linear_quantized),  # type: ignore[misc]
                lambda run=run: run(plain_packed),  # type: ignore[misc]
            )


def lowrank_cases(dtype: torch.dtype, rows: int, rank: int) -> Iterator[CpuCase]:
    """Every row its own adapter on all seven projections, then no adapter at all."""
    generator = torch.Generator().manual_seed(0)
    # Each layer's pages are apart in memory, as they are for a model's layers.
    tables = [
        random_tables(k, widths, [rank] * rows, generator, dtype=dtype)
        for _ in range(LAYERS)
        for k, widths in FUSED
    ]
    shapes = [(k, sum(widths)) for k, widths in FUSED] * LAYERS
    x = {k: torch.randn(rows, k).to(dtype) for k in (HIDDEN, INNER)}
    y = {n: torch.zeros(rows, n, dtype=dtype) for _, n in shapes}
    distinct = make_segments([(t, t + 1, t, 1.0) for t in range(rows)])

    def dispatched() -> None:
        for table, (k, n) in zip(tables, shapes, strict=True):
            lowrank_(y[n], x[k], table, distinct, 0)

    def plain() -> None:
        for t, (k, n) in zip(tables, shapes, strict=True):
            plain_lowrank_(y[n], x[k], *operands(t, distinct, 0))

    size = sum(table.arena.nbytes for table in tables)
    name = f"lowrank {_name(dtype)}, {rows} rows, {rows} adapters of rank {rank}"
    yield CpuCase(name, size, dispatched, plain)


def attention_cases(
    dtype: torch.dtype, sequences: int, keys: int, queries: int
) -> Iterator[CpuCase]:
    """Each sequence's last queries over its context."""
    generator = torch.Generator().manual_seed(0)
    cache = random_keys([keys] * sequences, KV_HEADS, HEAD_DIM, 16, generator, dtype)
    layers = [(cache.k_cache.clone(), cache.v_cache.clone()) for _ in range(LAYERS)]
    q = torch.randn(sequences * queries, HEADS, HEAD_DIM).to(dtype)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
    rest = (cache.block_tables, cache.seq_lens, starts, HEAD_DIM**-0.5)

    def run(version: Callable[..., Tensor]) -> None:
        for k, v in layers:
            version(q, k, v, *rest)

    size = sum(k.nbytes + v.nbytes for k, v in layers)
    name = f"attention {_name(dtype)}, {sequences} sequences of {keys} keys, {queries} queries each"
    yield CpuCase(name, size, lambda: run(paged_attention), lambda: run(plain_paged_attention))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(dtype: torch.dtype) -> Iterator[CpuCase]:
    """Every line of the table; one case's tensors are freed before the next is made."""
    few, many = [1, 2, 4, 8, 16, 32, 64], [64, 128, 256, 512, 1024]
    for linears in (linear_cases, onednn_cases, int8_cases, quantized_cases):
        yield from linears(dtype, few)
        yield from linears(dtype, many, head=False)
    yield from lowrank_cases(dtype, 16, 16)
    yield from attention_cases(dtype, 16, 129, 1)
    yield from attention_cases(dtype, 16, 1024, 1)
    yield from attention_cases(dtype, 4, 512, 64)
    yield from attention_cases(dtype, 1, 2048, 256)
    yield from attention_cases(dtype, 1, 2000, 2000)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", default="", help="the cases whose names hold this text")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    stopwatch = CallTimer(clock, args.repeat)
    speed = memory_speed(stopwatch)
    built = native.ensure()
    chosen = torch.ops.quickchange_native.instruction_set() if built else "plain torch"
    print(f"{args.threads} threads, {speed / 1e9:.1f} GB/s, {chosen}; ms: median (minimum)")
    with torch.inference_mode():
        for case in cases(getattr(torch, args.dtype)):
            if args.only not in case.name:
                continue
            fast, plain = (stopwatch.measure(run) for run in (case.dispatched, case.plain))
            floor = case.bytes_moved / speed * 1e3
            print(
                f"{case.name:62} {fast[0]:7.1f} ({fast[1]:6.1f})   plain {plain[0]:7.1f} "
                f"({plain[1]:6.1f})   floor {floor:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
