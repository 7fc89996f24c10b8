"""The tables as Markdown, and their places in the document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from quickchange_kernels.lowrank.lowrank_tables import LARGE_TILE, columns_of, parts_of
from quickchange_kernels.roofline import floors
from quickchange_kernels.roofline.beside_vllm import (
    QUICKCHANGE,
    QUICKCHANGE_DEPENDENT_OFF,
    VLLM,
    step_seconds,
)
from quickchange_kernels.roofline.floors import StepBatch
from quickchange_kernels.roofline.machine import H100, LLAMA_8B, MODELS, GpuRates, Model

if TYPE_CHECKING:
    from quickchange_kernels.roofline.compiled import MeasuredLaunch

ROWS = (1, 16, 64, 256)
ADAPTERS = (1, 16, 64)
RANKS = (16, 64)
CONTEXTS = (1024, 8192)
TURBO_HEADS = 4
BESIDE_ROWS = (1, 16, 64)
BESIDE_ADAPTERS = 16
PREFILL_ROWS = 2048


def batches() -> Iterator[StepBatch]:
    """Batches that the tables are computed for."""
    for rank in RANKS:
        for rows in ROWS:
            for adapters in ADAPTERS:
                if adapters <= rows:
                    yield StepBatch(rows, adapters, rank)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def microseconds(seconds: float) -> str:
    """A time as the tables write it, in µs."""
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def megabytes(count: float) -> str:
    """A size as the tables write it, in MB."""
    value = count / 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def lowrank_table(machine: GpuRates = H100) -> str:
    """One layer's four low-rank calls (q/k/v, o, gate/up, down) beside its linears."""
    header = ["model", "rank", "rows", "adapters", "A, MB", "B, MB + y", "shrink, µs"]
    header += ["expand, µs", "8 launches, µs", "linears, µs", "share of the linears"]
    cases = [(model, batch) for model in MODELS for batch in batches()]
    return table(header, (_lowrank_row(model, batch, machine) for model, batch in cases))


def _lowrank_row(model: Model, batch: StepBatch, machine: GpuRates) -> list[str]:
    groups = model.linears
    shrinks = [floors.shrink(group, batch) for group in groups]
    expands = [floors.expand(group, batch) for group in groups]
    shrink = sum(work.seconds(machine) for work in shrinks)
    expand = sum(work.seconds(machine) for work in expands)
    linears = sum(floors.linear(group, batch.rows).seconds(machine) for group in groups)
    return [
        model.name,
        str(batch.rank),
        str(batch.rows),
        str(batch.adapters),
        megabytes(sum(work.bytes for work in shrinks)),
        megabytes(sum(work.bytes for work in expands)),
        microseconds(shrink),
        microseconds(expand),
        microseconds(2 * len(groups) * machine.launch),
        microseconds(linears),
        f"{(shrink + expand) / linears:.1%}",
    ]


def other_table(machine: GpuRates = H100) -> str:
    """The kernels beside lowrank: attention and kv_write a layer, the others a step."""
    header = ["model", "rows", *(f"attention, {context} keys, µs" for context in CONTEXTS)]
    header += ["kv_write, µs"]
    header += [f"turbo_heads of {adapters}, µs" for adapters in ADAPTERS]
    header += ["sample, µs"]
    return table(header, (_other_row(model, rows, machine) for model in MODELS for rows in ROWS))


def _other_row(model: Model, rows: int, machine: GpuRates) -> list[str]:
    turbo = [
        microseconds(floors.turbo_heads(model, rows, count, TURBO_HEADS).seconds(machine))
        if count <= rows
        else "-"
        for count in ADAPTERS
    ]
    return [
        model.name,
        str(rows),
        *(microseconds(floors.attention(model, rows, n).seconds(machine)) for n in CONTEXTS),
        microseconds(floors.kv_write(model, rows).seconds(machine)),
        *turbo,
        microseconds(floors.sample(model, rows).seconds(machine)),
    ]


def step_table(machine: GpuRates = H100) -> str:
    """A whole decode step with the adapters on all linears, against the step without."""
    header = ["model", "rank", "rows", "adapters", "without, ms", "with, ms", "of it launches, ms"]
    header += ["with / without"]
    cases = [(model, batch) for model in MODELS for batch in batches()]
    return table(header, (_step_row(model, batch, machine) for model, batch in cases))


def _step_row(model: Model, batch: StepBatch, machine: GpuRates) -> list[str]:
    groups = model.linears
    layer = sum(floors.linear(group, batch.rows).seconds(machine) for group in groups)
    layer += floors.attention(model, batch.rows, CONTEXTS[0]).seconds(machine)
    without = model.layers * layer + floors.linear(model.head, batch.rows).seconds(machine)
    update = sum(
        floors.shrink(group, batch).seconds(machine) + floors.expand(group, batch).seconds(machine)
        for group in groups
    )
    launches = model.layers * 2 * len(groups) * machine.launch
    added = model.layers * update + launches
    return [
        model.name,
        str(batch.rank),
        str(batch.rows),
        str(batch.adapters),
        f"{without * 1e3:.2f}",
        f"{(without + added) * 1e3:.2f}",
        f"{launches * 1e3:.2f}",
        f"{(without + added) / without:.2f}",
    ]


def compiled_table(machine: GpuRates = H100) -> str:
    """Innermost loops of the compiled kernels that stream or multiply, sm_90."""
    from quickchange_kernels.roofline import compiled

    header = ["kernel", "registers", "programs on an SM", "programs a wave", "loop, instructions"]
    header += ["loop, bytes a warp", "ceiling of issue, TB/s", "over the bandwidth"]
    rows = []
    for one in compiled.shown():
        found = compiled.measured(one)
        ceiling = found.loop.ceiling(machine)
        rows.append(
            [
                one.name,
                str(found.registers),
                str(found.resident),
                str(found.resident * machine.processors),
                str(found.loop.instructions),
                str(found.loop.bytes_loaded),
                f"{ceiling / 1e12:.1f}",
                f"{ceiling / machine.bandwidth:.1f}",
            ]
        )
    return table(header, rows)


def waves_table(machine: GpuRates = H100) -> str:
    """lowrank decoding on q/k/v of Llama-3.1-8B: programs, waves, and an estimate of the time."""
    from quickchange_kernels.roofline import compiled

    header = ["rank", "rows", "adapters", "kernel", "programs", "waves", "bytes in flight, MB"]
    header += ["floor, µs", "estimate with launch, µs"]
    group = LLAMA_8B.linears[0]
    launches = [
        (batch, launch) for batch in batches() for launch in compiled.lowrank_launches(group, batch)
    ]
    return table(header, (_waves_row(batch, launch, machine) for batch, launch in launches))


def _waves_row(batch: StepBatch, launch: MeasuredLaunch, machine: GpuRates) -> list[str]:
    return [
        str(batch.rank),
        str(batch.rows),
        str(batch.adapters),
        launch.name,
        str(launch.programs),
        f"{launch.waves(machine):.2f}",
        megabytes(launch.in_flight(machine)),
        microseconds(launch.floor.seconds(machine)),
        microseconds(launch.seconds(machine)),
    ]


def beside_table(machine: GpuRates = H100) -> str:
    """A decode step of Llama-3.1-8B over 1,024 keys with adapters of rank 16, beside vLLM's."""
    header = ["rows", "adapters", "system", "linears, ms", "attention, ms", "updates, ms"]
    header += ["launches", "gaps, ms", "step, ms", "speed beside vLLM's"]
    rows = []
    for count in BESIDE_ROWS:
        batch = StepBatch(count, min(count, BESIDE_ADAPTERS), RANKS[0])
        systems = (VLLM, QUICKCHANGE_DEPENDENT_OFF, QUICKCHANGE)
        times = [step_seconds(each, LLAMA_8B, batch, CONTEXTS[0], machine) for each in systems]
        for system, time in zip(systems, times, strict=True):
            rows.append(
                [
                    str(count),
                    str(batch.adapters),
                    system.name,
                    *(f"{part * 1e3:.2f}" for part in time[:3]),
                    str(LLAMA_8B.layers * system.layer + system.once),
                    f"{time[3] * 1e3:.2f}",
                    f"{sum(time) * 1e3:.2f}",
                    f"{sum(times[0]) / sum(time):.2f}",
                ]
            )
    return table(header, rows)


def prefill_table(machine: GpuRates = H100) -> str:
    """Low-rank updates of a prefill of Llama-3.1-8B, one adapter, beside the base's products."""
    header = ["rank", "linears", "shrink, operations a byte", "shrink, µs", "expand, µs"]
    header += ["partial sums read again, MB", "base's product, µs", "share of it"]
    rows = []
    for rank in RANKS:
        batch = StepBatch(PREFILL_ROWS, 1, rank)
        for group in LLAMA_8B.linears:
            parts = parts_of(group.inputs)
            shrink = floors.shrink(group, batch, parts)
            expand = floors.expand(group, batch, parts)
            base = floors.linear(group, batch.rows).seconds(machine)
            update = shrink.seconds(machine) + expand.seconds(machine)
            blocks = sum(group.outputs) // columns_of(LARGE_TILE)
            again = batch.rows * blocks * parts * rank * floors.PARTIAL
            rows.append(
                [
                    str(rank),
                    group.name,
                    f"{shrink.operations / shrink.bytes:.0f}",
                    microseconds(shrink.seconds(machine)),
                    microseconds(expand.seconds(machine)),
                    megabytes(again),
                    microseconds(base),
                    f"{update / base:.0%}",
                ]
            )
    return table(header, rows)


FLOORS: dict[str, Callable[[], str]] = {
    "lowrank": lowrank_table,
    "others": other_table,
    "step": step_table,
    "beside vLLM": beside_table,
    "prefill": prefill_table,
}
COMPILED: dict[str, Callable[[], str]] = {"compiled": compiled_table, "waves": waves_table}


def written(document: str, names: Iterable[str]) -> str:
    """The document with the named tables made anew. Raises ValueError where one has no place."""
    for name in names:
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = document.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the document has no place '{begin.strip()}' ... '{end}': add it")
        text = {**FLOORS, **COMPILED}[name]()
        document = f"{before}{begin}{text}\n{end}{after}"
    return document
