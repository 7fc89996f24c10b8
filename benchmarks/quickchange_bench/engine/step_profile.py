"""Profile of a decode step: time by operation, against the floor of the bytes it must move.

Runs the engine itself, without processes or HTTP: `rows` sequences decode, each under an adapter of
its own or all plain, and torch's profiler says how long each operation took. What no operation
accounts for is Python: scheduling, the modules' own code, the profiler's overhead excepted (the
step's time is taken without it).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from quickchange_bench.models.random_adapters import (
    AdapterSpec,
    device_bytes,
    linear_shapes,
    write_adapters,
)
from quickchange_kernels.roofline.cpu_machine import read_bandwidth
from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.model.adapter_layers import PackedLinear
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.formats.peft.lora import read_peft

WARM_UP = 8  # steps
PROFILED = 10  # steps

# Parts of a step by the operation that they end in; what is left of the sampler's and the modules'
# small operations is "other torch operations".
_PARTS = {
    "quickchange::linear": "linears",
    "quickchange::linear_panels": "linears",
    "quickchange::lowrank_": "low-rank",
    "quickchange::lowrank_embedding_": "low-rank",
    "quickchange::paged_attention": "attention",
    "quickchange::kv_write_": "attention",
}


@dataclass(frozen=True, slots=True)
class StepPart:
    """One row of the table: time and floor in seconds per step, least bytes moved."""

    name: str
    seconds: float
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StepProfile:
    rows: int
    adapters: int
    context: int  # tokens a sequence, on average
    seconds: float  # median, without the profiler
    bandwidth: float  # bytes/s, measured reading
    parts: tuple[StepPart, ...]


def profile_step(
    model: str, folder: Path, *, rows: int, adapters: int, rank: int, prompt: int, threads: int
) -> StepProfile:
    """Profile decode steps of `rows` sequences over `adapters` distinct adapters (0: plain).

    `folder` receives the random adapters. `prompt` is in tokens.
    """
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    settings = Settings(model=model, store=str(folder), prefix_cache=False)
    loaded = load_model(
        model, dtype=torch.float32, device=torch.device("cpu"), adapters=adapters > 0
    )
    engine = _engine(loaded, settings, folder, adapters, rank)
    _submit(engine, loaded, rows, adapters, prompt)
    while engine.scheduler.foreground or any(s.remaining > 1 for s in engine.scheduler.running):
        engine.poll_adapters()
        engine.step()
    times = [_timed(engine) for _ in range(WARM_UP + PROFILED)][WARM_UP:]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        profiled = [_timed(engine) for _ in range(PROFILED)]
    context = prompt + WARM_UP + PROFILED + PROFILED // 2
    shapes = linear_shapes(Path(model), AdapterSpec().targets)
    floors = _bytes_moved(loaded, rows, context) | {
        "low-rank": adapters * device_bytes(shapes, rank, 4)
    }
    head = loaded.head.weight.numel()  # type: ignore[operator]
    parts = _parts(profiler, head, statistics.median(times), profiled, floors)
    engine.close()
    return StepProfile(rows, adapters, context, statistics.median(times), bandwidth, parts)


def step_table(profiles: Sequence[StepProfile]) -> str:
    """Markdown table for each profile, with each part's floor of bytes over bandwidth."""
    lines: list[str] = []
    for found in profiles:
        lines += [
            f"{found.rows} rows, {found.adapters} distinct adapters, context {found.context}: "
            f"{found.seconds * 1e3:.1f} ms a step (reading at {found.bandwidth / 1e9:.1f} GB/s)",
            "",
            "| part | ms | MB moved at least | floor, ms |",
            "|---|---|---|---|",
        ]
        for part in found.parts:
            moved = "" if part.bytes is None else f"{part.bytes / 1e6:.0f}"
            floor = "" if part.bytes is None else f"{part.bytes / found.bandwidth * 1e3:.1f}"
            lines.append(f"| {part.name} | {part.seconds * 1e3:.1f} | {moved} | {floor} |")
        total = sum(part.bytes or 0 for part in found.parts)
        lines += [
            f"| all | {found.seconds * 1e3:.1f} | {total / 1e6:.0f} | "
            f"{total / found.bandwidth * 1e3:.1f} |",
            "",
        ]
    return "\n".join(lines)


def _engine(
    loaded: LoadedModel, settings: Settings, folder: Path, adapters: int, rank: int
) -> Engine:
    base = Path(settings.model)
    names = [f"step-{index}" for index in range(adapters)]
    if names:
        write_adapters(base, folder, names, AdapterSpec(rank=rank))
    spec = base_spec(settings.model)
    return Engine(
        loaded,
        settings.model_copy(update={"adapters": adapters > 0}),
        load_adapter=lambda digest, _: read_peft(folder / digest, spec).adapter,
        on_wake=lambda: None,
    )


def _submit(engine: Engine, loaded: LoadedModel, rows: int, adapters: int, prompt: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for row in range(rows):
        tokens = torch.randint(loaded.vocabulary, (prompt,), generator=generator).tolist()
        component = (Component(f"step-{row % adapters}"),) if adapters else ()
        sampling = SamplingParams(max_tokens=10_000, temperature=0.0)
        engine.submit(Submit(str(row), tuple(tokens), sampling, component, seed=row))


def _timed(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def _bytes_moved(loaded: LoadedModel, rows: int, context: int) -> dict[str, int]:
    """Least bytes to read, by part: weights once, keys and values."""
    head = loaded.module.get_output_embeddings().weight  # type: ignore[operator]
    weights = sum(p.nbytes for p in loaded.module.parameters() if p.dim() == 2)
    linears = [one for one in loaded.module.modules() if isinstance(one, PackedLinear)]
    weights += sum(one.panels.nbytes for one in linears)
    tied = loaded.module.get_input_embeddings().weight is head  # type: ignore[operator]
    embedding = 0 if tied else loaded.module.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    values = sum(2 * shape.kv_heads * shape.head_size for shape in loaded.layers.values())
    return {
        "linears": weights - embedding - head.nbytes,
        "LM head": head.nbytes,
        "attention": rows * context * values * head.dtype.itemsize,
    }


def _parts(
    profiler: profile,
    head: int,
    step_seconds: float,
    profiled: Sequence[float],
    floors: dict[str, int],
) -> tuple[StepPart, ...]:
    """The table's rows. head: elements of the LM head's weight."""
    seconds = dict.fromkeys(("linears", "LM head", "low-rank", "attention", "other"), 0.0)
    for event in profiler.events():  # type: ignore[no-untyped-call]
        if event.cpu_parent is not None:
            continue
        part = _PARTS.get(event.name, "other")
        if part == "linears" and math.prod(event.input_shapes[1]) == head:
            part = "LM head"
        seconds[part] += event.cpu_time_total / 1e6 / len(profiled)
    parts = [
        StepPart(name, seconds[name], floors[name])
        for name in ("linears", "LM head", "low-rank", "attention")
    ]
    parts.append(StepPart("other torch operations", seconds["other"]))
    parts.append(StepPart("Python and the rest", step_seconds - sum(seconds.values())))
    return tuple(parts)
