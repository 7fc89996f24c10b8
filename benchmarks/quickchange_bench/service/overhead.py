"""Overhead of a part of the server on requests that do not use it.

Two of our servers run side by side, one with the part (`overhead_sides.py`), one without. Rounds
take turns, each pair in the other order than the last, so that a drifting machine favours neither;
the ratio of each pair is what counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from quickchange_bench import provenance
from quickchange_bench.bench_results import SCHEMA_VERSION, Load, MachineInfo, Summary
from quickchange_bench.load.load_client import Client
from quickchange_bench.load.load_runner import LoadPlan, measure
from quickchange_bench.load.workload import Workload, parse_length
from quickchange_bench.report_tables import number, table
from quickchange_bench.service.overhead_sides import SIDES, Part, Sides
from quickchange_bench.summary_stats import ratio, spread


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    model: Path
    loads: tuple[Load, ...]
    of: Part = "adapters"
    repeat: int = 7
    requests_per_worker: int = 2
    prompt_tokens: str = "64"
    output_tokens: str = "64"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """One round at one load on both servers."""

    load: Load
    turn: int
    on: Summary
    off: Summary


@dataclass(frozen=True, slots=True)
class Overhead:
    """On over off at one load: 1 means free. Ratios of each pair's tokens/s and tokens/CPU s."""

    load: Load
    pairs: int
    ratio: float
    lowest: float
    highest: float
    cpu_ratio: float | None
    off_spread: float | None  # spread of tokens/s without the part: the machine's noise
    errors: int


@dataclass(frozen=True, slots=True)
class OverheadResult:
    model: str
    machine: MachineInfo
    commit: str | None
    command: str
    started: str
    overheads: tuple[Overhead, ...]
    pairs: tuple[Pair, ...]
    of: Part = "adapters"
    kind: str = "overhead"
    version: int = SCHEMA_VERSION


def measure_overhead(options: OverheadOptions, say: Callable[[str], None]) -> OverheadResult:
    """Start both servers, measure, end them. `say` is called with the progress."""
    started = provenance.now()
    with TemporaryDirectory(prefix="quickchange-overhead-") as folder:
        make = SIDES[options.of]
        with make(options.model, Path(folder), device=options.device, dtype=options.dtype) as sides:
            pairs = asyncio.run(_measure(options, sides, say))
    return OverheadResult(
        model=options.model.name,
        machine=provenance.machine(),
        commit=provenance.commit(),
        command=provenance.command(),
        started=started,
        overheads=summarise_pairs(pairs),
        pairs=tuple(pairs),
        of=options.of,
    )


async def _measure(
    options: OverheadOptions, sides: Sides, say: Callable[[str], None]
) -> list[Pair]:
    plan = LoadPlan(
        workload=Workload(
            parse_length(options.prompt_tokens),
            parse_length(options.output_tokens),
            seed=options.seed,
        ),
        loads=options.loads,
        repeat=options.repeat,
        requests_per_worker=options.requests_per_worker,
        warmup=2,
    )
    pairs = []
    on, off = sides.on, sides.off
    async with (
        Client(on.server.url, on.target) as client_on,
        Client(off.server.url, off.target) as client_off,
    ):
        for turn in range(plan.repeat):
            for place, load in enumerate(plan.loads):
                both = [("on", client_on, on.server), ("off", client_off, off.server)]
                found = {
                    name: await measure(client, plan, load, turn=turn, place=place, pid=server.pid)
                    for name, client, server in (both if (turn + place) % 2 == 0 else both[::-1])
                }
                pairs.append(Pair(load, turn, on=found["on"], off=found["off"]))
                say(_describe(pairs[-1]))
    return pairs


def _describe(pair: Pair) -> str:
    return (
        f"round {pair.turn + 1}, {pair.load.name}: on {pair.on.tokens_per_second:.1f}, "
        f"off {pair.off.tokens_per_second:.1f} tok/s"
    )


def summarise_pairs(pairs: list[Pair]) -> tuple[Overhead, ...]:
    """Overhead at each load."""
    found = []
    for load in dict.fromkeys(pair.load for pair in pairs):
        own = [pair for pair in pairs if pair.load == load]
        ratios = [
            value
            for pair in own
            if (value := ratio(pair.on.tokens_per_second, pair.off.tokens_per_second)) is not None
        ]
        if not ratios:
            raise RuntimeError(f"{load.name}: no pair of rounds gave a token: {own[0].off}")
        cpu_ratios = [
            value
            for pair in own
            if (value := ratio(pair.on.tokens_per_cpu_second, pair.off.tokens_per_cpu_second))
            is not None
        ]
        found.append(
            Overhead(
                load=load,
                pairs=len(ratios),
                ratio=median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                cpu_ratio=median(cpu_ratios) if cpu_ratios else None,
                off_spread=spread([pair.off.tokens_per_second for pair in own]),
                errors=sum(pair.on.errors + pair.off.errors for pair in own),
            )
        )
    return tuple(found)


def overhead_table(result: OverheadResult) -> str:
    header = (
        "load",
        "pairs",
        "on / off",
        "lowest",
        "highest",
        "by CPU s",
        "off spread %",
        "errors",
    )
    rows = [
        [
            o.load.name,
            str(o.pairs),
            number(o.ratio, 3),
            number(o.lowest, 3),
            number(o.highest, 3),
            number(o.cpu_ratio, 3),
            number(o.off_spread, 1, 100),
            str(o.errors),
        ]
        for o in result.overheads
    ]
    return table(header, rows)
