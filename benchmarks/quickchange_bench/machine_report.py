"""This machine's rates and the limits of the workloads in RESULTS.md, as a table and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quickchange_bench import provenance
from quickchange_bench.bench_results import SCHEMA_VERSION, MachineInfo
from quickchange_bench.report_tables import MILLI, number, table
from quickchange_kernels.roofline.machine import OPERANDS, CpuRates, MachineRates, Model
from quickchange_kernels.roofline.workload_limits import (
    PRECISIONS,
    ClosedLoop,
    WorkloadLimit,
    workload_limit,
)

GIGA, MEGA, MICRO = 1e-9, 1e-6, 1e6


@dataclass(frozen=True)
class LoadLimit:
    """The limit of one load in one precision."""

    weights: str  # of PRECISIONS
    load: ClosedLoop
    limit: WorkloadLimit


@dataclass(frozen=True)
class MachineReport:
    """All that `bench machine` says."""

    model: str
    rates: CpuRates
    limits: tuple[LoadLimit, ...]
    machine: MachineInfo
    commit: str | None
    command: str
    started: str
    kind: str = "machine"
    version: int = SCHEMA_VERSION


def read_model(folder: Path) -> Model:
    """Sizes of the base model in a folder of transformers' layout.

    Raises:
        ValueError: no config.json there, or of a model whose limits are not reckoned.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: give a folder in transformers' layout")
    return Model.of_config(folder.name, json.loads(file.read_text()))


def limits_of(
    machine: MachineRates, model: Model, loads: Sequence[ClosedLoop]
) -> tuple[LoadLimit, ...]:
    """The limit of each load in each precision."""
    return tuple(
        LoadLimit(name, load, workload_limit(machine, model, precision, load))
        for name, precision in PRECISIONS.items()
        for load in loads
    )


def closed_loops(
    concurrent: Sequence[int], *, prompt: int, answer: int, rank: int
) -> tuple[ClosedLoop, ...]:
    """Each number of requests at once without adapters, then each request under its own."""
    return tuple(
        ClosedLoop(count, prompt, answer, count * distinct, rank)
        for distinct in (0, 1)
        for count in concurrent
    )


def measure_machine(
    folder: Path, loads: Sequence[ClosedLoop], threads: int | None = None
) -> MachineReport:
    """Measure the machine and reckon the limits of a base model on it.

    Raises:
        ValueError: see `read_model`.
        RuntimeError: see `measure_cpu`.
    """
    from quickchange_kernels.roofline.cpu_machine import measure_cpu  # needs torch

    model = read_model(folder)  # before anything is measured
    info = provenance.machine()
    rates = measure_cpu(info.cpu, threads)
    return MachineReport(
        model=model.name,
        rates=rates,
        limits=limits_of(rates, model, loads),
        machine=info,
        commit=provenance.commit(),
        command=provenance.command(),
        started=provenance.now(),
    )


def machine_text(report: MachineReport) -> str:
    """The machine and its limits, in Markdown."""
    rates = report.rates
    quota = rates.allowance.quota
    return "\n".join(
        [
            f"- machine: {rates.name}, {rates.instruction_set}; {rates.threads} threads; "
            f"{rates.allowance.usable} usable cores (affinity {rates.allowance.affinity}, "
            f"{'no quota' if quota is None else f'quota {quota:g}'})",
            f"- memory, as read: {number(rates.bandwidth, 1, GIGA)} GB/s",
            f"- an operation on all threads begins and ends in {number(rates.share, 1, MICRO)} µs; "
            f"after a pause in {number(rates.wake, 1, MICRO)} µs",
            f"- model: {report.model}",
            f"- commit: {report.commit or 'unknown'}",
            f"- command: `{report.command}`",
            "",
            _rates_table(rates),
            *(["", limits_table(report.limits)] if report.limits else []),
        ]
    )


def _rates_table(rates: CpuRates) -> str:
    rows = [
        [
            kind if rates.native(kind) else f"{kind}, as float32",
            number(rates.operations[kind] / 2, 0, GIGA),
            number(rates.operations[kind] / 2 / rates.threads, 0, GIGA),
        ]
        for kind in OPERANDS
    ]
    return table(["operands", "10⁹ multiply-adds/s", "a thread"], rows)


def limits_table(limits: Sequence[LoadLimit]) -> str:
    """One line a load and precision."""
    header = ["weights", "requests", "adapters", "step MB", "reading ms", "arithmetic ms"]
    header += ["prompt ms", "limit tok/s"]
    return table(header, [_limit_row(one) for one in limits])


def _limit_row(one: LoadLimit) -> list[str]:
    return [
        one.weights,
        str(one.load.concurrent),
        str(one.load.adapters),
        number(one.limit.step_bytes, 0, MEGA),
        number(one.limit.step_reading, 1, MILLI),
        number(one.limit.step_arithmetic, 1, MILLI),
        number(one.limit.prompt_arithmetic, 1, MILLI),
        number(one.limit.tokens_per_second, 0),
    ]
