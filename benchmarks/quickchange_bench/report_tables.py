"""Results as JSON files, Markdown tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quickchange_bench.bench_results import SCHEMA_VERSION, Median, ServingResult
from quickchange_bench.summary_stats import ratio

MILLI = 1e3
MEBI = 1024.0**2


def save(result: Any, path: Path) -> None:
    """Write a result's fields as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(asdict(result), indent=2) + "\n")
    part.replace(path)


def load_serving(path: Path) -> ServingResult:
    """Read what `bench serving` wrote.

    Raises:
        ValueError: not JSON, not a serving result, or one of another version.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = (content.get("kind"), content.get("version")) if isinstance(content, dict) else None
    if found != ("serving", SCHEMA_VERSION):
        raise ValueError(
            f"{path} is not a serving result of version {SCHEMA_VERSION}: run the benchmark again"
        )
    try:
        return TypeAdapter(ServingResult).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from error


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


SERVING_HEADER = (
    "load", "tok/s", "spread %", "TTFT p50 ms", "p99 ms", "ITL p50 ms", "p99 ms", "tok/CPU s",
    "other cores", "peak RSS MiB", "PSS MiB", "errors",
)  # fmt: skip


def serving_row(median: Median) -> list[str]:
    v = median.values
    return [
        median.load.name,
        number(v["tokens_per_second"]),
        number(median.spread, 0, 100),
        number(v["ttft_p50"], 0, MILLI),
        number(v["ttft_p99"], 0, MILLI),
        number(v["itl_p50"], 1, MILLI),
        number(v["itl_p99"], 1, MILLI),
        number(v["tokens_per_cpu_second"]),
        number(v["other_cores"], 2),
        number(v["peak_rss"], 0, 1 / MEBI),
        number(v["pss"], 0, 1 / MEBI),
        str(median.errors),
    ]


def serving_table(result: ServingResult) -> str:
    return table(SERVING_HEADER, [serving_row(median) for median in result.medians])


def describe(result: ServingResult) -> str:
    """Lines above a published table."""
    load, machine = result.workload, result.machine
    adapters = f"{load.adapters} adapters, {load.popularity}" if load.popularity else "no adapter"
    return "\n".join(
        [
            f"- machine: {machine.cpu}, {machine.cores} cores, {machine.memory / 1024**3:.0f} GiB"
            + (f", {machine.gpu}" if machine.gpu else ""),
            f"- model: {result.model}",
            f"- workload: {adapters}; prompts {load.prompt_tokens}, answers {load.output_tokens} "
            f"tokens; median of {load.repeat}; seed {load.seed}",
            f"- commit: {result.commit or 'unknown'}",
            f"- command: `{result.command}`",
        ]
    )


def comparison(results: Sequence[ServingResult], metric: str = "tokens_per_second") -> str:
    """Medians of one metric side by side; in brackets the first result's value over the other's.

    Raises:
        ValueError: no such metric, or fewer than two results.
    """
    if len(results) < 2:
        raise ValueError("comparing needs at least two results")
    values = [{m.load.name: m.values for m in result.medians} for result in results]
    for result in results:
        for median in result.medians:
            if metric not in median.values:
                known = ", ".join(median.values)
                raise ValueError(f"metric {metric!r} is none of {known}")
    rows = []
    for load in values[0]:
        own = values[0][load][metric]
        row = [load, number(own, 3)]
        for other in values[1:]:
            theirs = other.get(load, {}).get(metric)
            row.append(f"{number(theirs, 3)} ({number(ratio(own, theirs), 2)}x)")
        rows.append(row)
    return table([metric, *(result.label for result in results)], rows)


def plot(results: Sequence[ServingResult], path: Path) -> None:
    """Throughput, first-token and inter-token latency over the loads, one line a result; a PNG.

    Raises:
        RuntimeError: matplotlib is not installed; says how to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "a plot needs matplotlib: pip install 'quickchange[bench]', or leave --plot out"
        ) from error
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("tokens_per_second", "tokens/s", 1.0),
        ("ttft_p50", "time to first token, median (ms)", MILLI),
        ("itl_p50", "time between tokens, median (ms)", MILLI),
    )
    for axis, (metric, title, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for result in results:
            known = [m for m in result.medians if m.values[metric] is not None]
            axis.plot(
                [m.load.name for m in known],
                [(m.values[metric] or 0.0) * scale for m in known],
                marker="o",
                label=result.label,
            )
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
