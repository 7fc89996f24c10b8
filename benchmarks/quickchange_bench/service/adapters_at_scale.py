"""Benchmark of many registered adapters with few resident: errors, memory growth, stalls.

The server starts with a device budget for a few of the adapters. Two kinds of phase take turns,
equal in requests, lengths and number at once:

    quiet  the background asks only for adapters that stay resident
    loads  the background asks for all of them, Zipf-popular, so adapters come and go

Meanwhile steady streams run on pinned adapters. The times between their tokens in the two kinds of
phase show what loads cost requests that need none; samples of every process's memory show its
growth.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from quickchange_bench import provenance
from quickchange_bench.bench_results import SCHEMA_VERSION, ClientCompletion, MachineInfo
from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import Client, ServedNames
from quickchange_bench.load.load_runner import closed_loop
from quickchange_bench.load.memory_growth import Growth, Samples, growth_table, sample_forever
from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.server_process import RunningServer
from quickchange_bench.load.workload import Fixed, Request, Workload
from quickchange_bench.models.random_adapters import AdapterSpec, device_bytes, write_adapters
from quickchange_bench.report_tables import MEBI, MILLI, number, table
from quickchange_bench.summary_stats import percentile, ratio

PhaseKind = Literal["quiet", "loads"]
PHASES: tuple[PhaseKind, ...] = get_args(PhaseKind)
STEADY_TOKENS = 128
BACKGROUND_TOKENS = 16  # short, so that adapters change often
PROMPT_TOKENS = 32
BUDGET_SLACK = 1.05  # over the adapters' own bytes, for alignment
STEADY_INDEX = 10_000_000  # request indices of steady streams, apart from the background's


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    model: Path
    adapters: int = 500
    resident: int = 32
    host_resident: int = 64
    rank: int = 16
    minutes: float = 10.0
    phase_seconds: float = 60.0
    workers: int = 4
    steady: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.hot <= self.resident < self.adapters:
            raise ValueError(
                f"{self.resident} resident adapters: at least {self.hot} (the steady streams' and "
                f"the quiet background's) and fewer than all {self.adapters} are needed"
            )
        if self.dtype not in own_server.VALUE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(own_server.VALUE_BYTES)}")

    @property
    def hot(self) -> int:
        """Adapters that the quiet phases use: one a steady stream, two a background worker."""
        return self.steady + 2 * self.workers

    @property
    def names(self) -> list[str]:
        return [f"scale-{k:04d}" for k in range(self.adapters)]


@dataclass(frozen=True, slots=True)
class Phase:
    kind: PhaseKind
    seconds: float
    requests: int
    errors: int
    loads: int  # adapters loaded onto the device meanwhile
    itl_p50: float | None  # steady streams
    itl_p99: float | None
    ttft_p50: float | None  # background requests
    ttft_p99: float | None
    first_error: str | None


@dataclass(frozen=True, slots=True)
class ScaleResult:
    options: dict[str, str]
    model: str
    machine: MachineInfo
    commit: str | None
    command: str
    started: str
    errors: int
    requests: int
    loads: int
    quiet_itl_p99: float | None  # over all quiet phases together
    loads_itl_p99: float | None
    itl_p99_ratio: float | None
    phases: tuple[Phase, ...]
    growth: tuple[Growth, ...]
    kind: str = "adapters-at-scale"
    version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of one phase and its duration."""

    kind: PhaseKind
    seconds: float
    loads: int
    steady: tuple[ClientCompletion, ...]
    background: tuple[ClientCompletion, ...]

    @property
    def gaps(self) -> list[float]:
        return [gap for done in self.steady if done.error is None for gap in done.gaps]

    def phase(self) -> Phase:
        done = (*self.steady, *self.background)
        failed = [c.error for c in done if c.error is not None]
        waits = [c.ttft for c in self.background if c.ttft is not None]
        return Phase(
            kind=self.kind,
            seconds=self.seconds,
            requests=len(done),
            errors=len(failed),
            loads=self.loads,
            itl_p50=percentile(self.gaps, 50),
            itl_p99=percentile(self.gaps, 99),
            ttft_p50=percentile(waits, 50),
            ttft_p99=percentile(waits, 99),
            first_error=failed[0] if failed else None,
        )


class ScaleBench:
    """Drives one running server through the phases."""

    def __init__(self, options: ScaleOptions, server: RunningServer, client: Client) -> None:
        self._options = options
        self._server = server
        self._client = client
        self._background_indices = count()
        self._steady_indices = count(STEADY_INDEX)

    async def fill(self) -> None:
        """Use more adapters than both tiers hold, so that memory reaches its level.

        Raises:
            RuntimeError: one of them failed.
        """
        reach = min(self._options.adapters, self._options.host_resident + self._options.resident)
        touch = (Request(k, "Load this adapter", 1, k) for k in reversed(range(reach)))
        failed = [d.error for d in await closed_loop(self._client, touch, 2) if d.error]
        if failed:
            raise RuntimeError(f"{len(failed)} of {reach} adapters failed at first: {failed[0]}")

    async def phase(self, kind: PhaseKind) -> Traffic:
        """Steady streams until the phase's time is over, the background for as long as they run."""
        started = time.monotonic()
        loads = await asyncio.to_thread(own_server.device_loads, self._server.url)
        over = asyncio.Event()
        deadline = started + self._options.phase_seconds
        async with asyncio.TaskGroup() as group:
            background = group.create_task(
                closed_loop(self._client, self._background(kind, over), self._options.workers)
            )
            streams = [
                group.create_task(closed_loop(self._client, self._stream(k, deadline), 1))
                for k in range(self._options.steady)
            ]
            await asyncio.gather(*streams)
            over.set()
        after = await asyncio.to_thread(own_server.device_loads, self._server.url)
        return Traffic(
            kind=kind,
            seconds=time.monotonic() - started,
            loads=after - loads,
            steady=tuple(done for stream in streams for done in stream.result()),
            background=tuple(background.result()),
        )

    def _stream(self, adapter: int, deadline: float) -> Iterator[Request]:
        workload = Workload(Fixed(PROMPT_TOKENS), Fixed(STEADY_TOKENS), seed=self._options.seed)
        while time.monotonic() < deadline:
            plain = workload.request(next(self._steady_indices))
            yield Request(plain.index, plain.prompt, plain.output_tokens, adapter)

    def _background(self, kind: PhaseKind, over: asyncio.Event) -> Iterator[Request]:
        options = self._options
        popularity = (
            Popularity("zipf", options.adapters, options.seed)
            if kind == "loads"
            else Popularity("uniform", options.hot - options.steady, options.seed)
        )
        # a quiet background keeps off the steady streams' adapters: as many rows, as many adapters
        first = 0 if kind == "loads" else options.steady
        workload = Workload(Fixed(PROMPT_TOKENS), Fixed(BACKGROUND_TOKENS), seed=options.seed)
        while not over.is_set():
            plain = workload.request(next(self._background_indices))
            adapter = first + popularity.adapter(plain.index)
            yield Request(plain.index, plain.prompt, plain.output_tokens, adapter)


async def _drive(
    options: ScaleOptions, server: RunningServer, say: Callable[[str], None]
) -> tuple[list[Traffic], Samples]:
    target = ServedNames(own_server.BASE_NAME, tuple(options.names))
    connections = options.workers + options.steady
    traffic: list[Traffic] = []
    async with Client(server.url, target, connections=connections) as client:
        bench = ScaleBench(options, server, client)
        await bench.fill()
        for kind in PHASES:  # warm-up, not counted
            say(f"warm-up, {describe(await bench.phase(kind))}")
        samples = Samples()
        sampler = asyncio.create_task(sample_forever(server.pid, samples))
        deadline = time.monotonic() + 60 * options.minutes
        try:
            while time.monotonic() < deadline or not traffic:
                for kind in PHASES:
                    traffic.append(await bench.phase(kind))
                    say(describe(traffic[-1]))
        finally:
            sampler.cancel()
            with suppress(asyncio.CancelledError):
                await sampler
    return traffic, samples


def describe(traffic: Traffic) -> str:
    p = traffic.phase()
    error = f" ({p.first_error})" if p.first_error else ""
    return (
        f"{p.kind}: {p.requests} requests, {p.errors} errors{error}, {p.loads} loads, steady "
        f"tokens p50 {number(p.itl_p50, 1, MILLI)} p99 {number(p.itl_p99, 1, MILLI)} ms"
    )


def measure_scale(
    options: ScaleOptions, work_dir: Path | None, say: Callable[[str], None]
) -> ScaleResult:
    """Make the adapters, start the server, register, measure, end it. `say` gets the progress."""
    started = provenance.now()
    with own_server.working_folder(work_dir, "scale") as work:
        say(f"writing {options.adapters} adapters of rank {options.rank}")
        spec = AdapterSpec(rank=options.rank, seed=options.seed)
        shapes = write_adapters(options.model, work / "adapters", options.names, spec)
        size = device_bytes(shapes, options.rank, own_server.VALUE_BYTES[options.dtype])
        own = own_server.OwnServer(
            model=str(options.model),
            store=work / "store",
            device=options.device,
            dtype=options.dtype,
            environment={
                "QUICKCHANGE_ADAPTER_DEVICE_BYTES": str(_budget(options.resident, size)),
                "QUICKCHANGE_ADAPTER_HOST_BYTES": str(_budget(options.host_resident, size)),
            },
        )
        with own.running(work / "server.log") as server:
            say(f"registering; {size / MEBI:.1f} MiB each on the device")
            own_server.register(server.url, {n: work / "adapters" / n for n in options.names})
            for name in options.names[: options.steady]:
                own_server.pin(server.url, name)
            traffic, samples = asyncio.run(_drive(options, server, say))
    return _result(options, started, traffic, samples)


def _budget(adapters: int, size: int) -> int:
    return int(adapters * size * BUDGET_SLACK)


def _result(
    options: ScaleOptions, started: str, traffic: list[Traffic], samples: Samples
) -> ScaleResult:
    phases = tuple(t.phase() for t in traffic)
    p99 = {
        kind: percentile([gap for t in traffic if t.kind == kind for gap in t.gaps], 99)
        for kind in PHASES
    }
    return ScaleResult(
        options={
            name: str(getattr(options, name)) for name in options.__slots__ if name != "model"
        },
        model=options.model.name,
        machine=provenance.machine(),
        commit=provenance.commit(),
        command=provenance.command(),
        started=started,
        errors=sum(p.errors for p in phases),
        requests=sum(p.requests for p in phases),
        loads=sum(p.loads for p in phases),
        quiet_itl_p99=p99["quiet"],
        loads_itl_p99=p99["loads"],
        itl_p99_ratio=ratio(p99["loads"], p99["quiet"]),
        phases=phases,
        growth=samples.growth(),
    )


def scale_table(result: ScaleResult) -> str:
    phases = table(
        ("phase", "requests", "errors", "loads", "steady p50 ms", "p99 ms", "first token p50 ms",
         "p99 ms"),
        [
            [p.kind, str(p.requests), str(p.errors), str(p.loads), number(p.itl_p50, 1, MILLI),
             number(p.itl_p99, 1, MILLI), number(p.ttft_p50, 0, MILLI),
             number(p.ttft_p99, 0, MILLI)]
            for p in result.phases
        ],
    )  # fmt: skip
    total = (
        f"{result.requests} requests, {result.errors} errors, {result.loads} loads; steady tokens' "
        f"p99 {number(result.loads_itl_p99, 1, MILLI)} ms with loads, "
        f"{number(result.quiet_itl_p99, 1, MILLI)} ms without: "
        f"{number(result.itl_p99_ratio, 2)}x"
    )
    return "\n\n".join([phases, growth_table(result.growth), total])
