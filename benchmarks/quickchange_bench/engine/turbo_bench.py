"""Speed-up by drafts: the same requests with Turbo on and off, on one server, by turns.

Greedy, so both must answer with the same text; that is checked for every pair. The prefix cache is
off: the second of a pair would find the first one's prompts in it. Rounds go over all tasks and
loads before they repeat, on and off in turn first; the ratio of each pair is what counts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
from prometheus_client.parser import text_string_to_metric_families

from quickchange_bench import provenance
from quickchange_bench.bench_results import (
    SCHEMA_VERSION,
    ClientCompletion,
    Load,
    MachineInfo,
    Summary,
    summarise,
)
from quickchange_bench.engine.turbo_tasks import Ask, demo_asks
from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import Body, Client, ServedNames
from quickchange_bench.load.load_runner import closed_loop
from quickchange_bench.load.workload import Request
from quickchange_bench.report_tables import MILLI, number, table
from quickchange_bench.summary_stats import median_of, ratio

OFF = "off"
_LEAST_REQUESTS = 8
_WARMUP_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class TurboOptions:
    """Options of the run. `store` None: a new one with the demo's adapters."""

    model: Path
    tasks: tuple[str, ...]
    loads: tuple[Load, ...]  # closed loops
    store: str | None = None
    base_heads: str = "base-heads"
    repeat: int = 3
    requests_per_worker: int = 2
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if any(load.workers is None for load in self.loads):
            raise ValueError("the Turbo benchmark runs closed loops: give --concurrency")

    def count(self, load: Load) -> int:
        """Number of requests in one round."""
        return max(_LEAST_REQUESTS, self.requests_per_worker * (load.workers or 1))


@dataclass(frozen=True, slots=True)
class Depth:
    """Drafts at one depth, from 1: tokens after the certain one."""

    depth: int
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class DraftingSide:
    """Figures of one round with drafts on, or off."""

    summary: Summary
    tokens_per_step: float | None  # new tokens of a request in a step that gives it any
    depths: tuple[Depth, ...]


@dataclass(frozen=True, slots=True)
class TurboPair:
    """One round of one task at one load, with drafts on and off."""

    task: str
    load: Load
    turn: int
    on: DraftingSide
    off: DraftingSide
    different: int  # answers that are not the same: must be 0

    @property
    def ratio(self) -> float | None:
        return ratio(self.on.summary.tokens_per_second, self.off.summary.tokens_per_second)


@dataclass(frozen=True, slots=True)
class TurboGain:
    """Medians of one task at one load; ratios are on over off, pair by pair. Times in seconds."""

    task: str
    load: Load
    pairs: int
    on: float  # tokens/s
    off: float
    ratio: float
    lowest: float
    highest: float
    tokens_per_step: float | None
    depths: tuple[Depth, ...]  # all rounds together
    on_times: Mapping[str, float | None]  # ttft_p50, ttft_p99, itl_p50, itl_p99
    off_times: Mapping[str, float | None]
    different: int
    errors: int


@dataclass(frozen=True, slots=True)
class TurboResult:
    model: str
    machine: MachineInfo
    commit: str | None
    command: str
    started: str
    gains: tuple[TurboGain, ...]
    pairs: tuple[TurboPair, ...]
    kind: str = "turbo"
    version: int = SCHEMA_VERSION


class AskClient(Client):
    """Client that sends one task's prompts to one model, answered to their natural end."""

    def __init__(self, url: str, ask: Ask, turbo: str, connections: int) -> None:
        super().__init__(
            url, ServedNames(ask.model), connections=connections + 1
        )  # and the metrics
        self._ask = ask
        self._turbo = turbo

    def body(self, request: Request) -> Body:
        return {
            "model": self._ask.model,
            "prompt": list(self._ask.prompts[str(request.prompt)]),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "turbo": self._turbo,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def measure_turbo(options: TurboOptions, say: Callable[[str], None]) -> TurboResult:
    """Start the server, measure, end it. `say` is called with the progress."""
    started = provenance.now()
    with TemporaryDirectory(prefix="quickchange-turbo-") as folder:
        work = Path(folder)
        server = own_server.OwnServer(
            model=str(options.model),
            store=options.store or str(_demo_store(work / "store", options.model)),
            device=options.device,
            dtype=options.dtype,
            environment={"QUICKCHANGE_PREFIX_CACHE": "false"},
        )
        with server.running(work / "server.log") as running:
            most = max(options.count(load) for load in options.loads)
            asks = demo_asks(
                options.tasks,
                options.model,
                served_names(running.url),
                own_server.BASE_NAME,
                options.base_heads,
                most,
            )
            pairs = asyncio.run(measure_pairs(options, running.url, list(asks), say))
    return TurboResult(
        model=options.model.name,
        machine=provenance.machine(),
        commit=provenance.commit(),
        command=provenance.command(),
        started=started,
        gains=summarise_gains(pairs),
        pairs=tuple(pairs),
    )


def _demo_store(folder: Path, model: Path) -> Path:
    from quickchange_store.base_model.base_spec import base_spec
    from quickchange_store.store import Store
    from quickchange_training.demo import publish_demo_adapters

    publish_demo_adapters(Store(folder), base_spec(str(model)))
    return folder


def served_names(url: str) -> list[str]:
    """Names of all served models, aliases included."""
    with httpx.Client(base_url=url, timeout=own_server.ADMIN_SECONDS, trust_env=False) as http:
        response = http.get("/v1/models")
    return [model["id"] for model in response.raise_for_status().json()["data"]]


async def measure_pairs(
    options: TurboOptions, url: str, asks: Sequence[Ask], say: Callable[[str], None]
) -> list[TurboPair]:
    """Measure every round of every task and load. `say` is called after each pair."""
    pairs = []
    connections = max(load.workers or 1 for load in options.loads)
    async with AsyncExitStack() as stack:
        lanes = []
        for ask in asks:
            on = await stack.enter_async_context(AskClient(url, ask, ask.turbo, connections))
            off = await stack.enter_async_context(AskClient(url, ask, OFF, connections))
            lanes.append(TaskClients(ask, url, on, off))
            await lanes[-1].warm_up()
        for turn in range(options.repeat):
            for place, lane in enumerate(lanes):
                for step, load in enumerate(options.loads):
                    on_first = (turn + place + step) % 2 == 0
                    pair = await lane.pair(load, options.count(load), turn, on_first=on_first)
                    pairs.append(pair)
                    say(_describe(pair))
    return pairs


@dataclass(frozen=True)
class _Round:
    side: DraftingSide
    answers: Mapping[int, tuple[str, int]]  # by index: text and number of tokens


@dataclass(frozen=True)
class TaskClients:
    """One task and its clients with drafts on and off."""

    ask: Ask
    url: str
    on: AskClient
    off: AskClient

    async def warm_up(self) -> None:
        """Bring the adapters to the device and let the server learn the acceptance of drafts.

        Raises:
            RuntimeError: the server refuses what this lane asks.
        """
        for client in (self.on, self.off):
            done = await closed_loop(client, self.ask.requests(_WARMUP_REQUESTS), _WARMUP_REQUESTS)
            if failed := [c.error for c in done if c.error is not None]:
                raise RuntimeError(f"{self.ask.task}: {failed[0]}")

    async def pair(self, load: Load, count: int, turn: int, *, on_first: bool) -> TurboPair:
        first, second = (self.on, self.off) if on_first else (self.off, self.on)
        rounds = [await self._round(client, load, count) for client in (first, second)]
        on, off = rounds if on_first else rounds[::-1]
        both = on.answers.keys() & off.answers.keys()
        different = sum(on.answers[k] != off.answers[k] for k in both)
        return TurboPair(self.ask.task, load, turn, on.side, off.side, different)

    async def _round(self, client: AskClient, load: Load, count: int) -> _Round:
        before = await _drafts(client.http)
        done = await closed_loop(client, self.ask.requests(count), load.workers or 1)
        after = await _drafts(client.http)
        answers = {c.index: (c.text, c.output_tokens) for c in done if c.error is None}
        return _Round(side_of(done, before, after), answers)


Drafts = Counter[tuple[str, int]]  # ("drafted" or "accepted", depth): tokens since the start


async def _drafts(http: httpx.AsyncClient) -> Drafts:
    return count_drafts((await http.get("/metrics")).raise_for_status().text)


def count_drafts(exposition: str) -> Drafts:
    """Draft tokens by depth, all drafters together, from Prometheus' text."""
    found: Drafts = Counter()
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            for what in ("drafted", "accepted"):
                if sample.name == f"quickchange_speculation_{what}_tokens_total":
                    found[what, int(sample.labels["depth"])] += int(sample.value)
    return found


def side_of(done: Sequence[ClientCompletion], before: Drafts, after: Drafts) -> DraftingSide:
    """Figures of a round from its requests' outcomes and the draft counts before and after it."""
    summary = summarise(done, None)
    between = after - before
    depths = tuple(
        Depth(depth, between["drafted", depth], between["accepted", depth])
        for depth in sorted({depth for _, depth in between})
    )
    undrafted = summary.output_tokens - sum(depth.accepted for depth in depths)
    return DraftingSide(
        summary=summary,
        tokens_per_step=ratio(summary.output_tokens, undrafted),
        depths=depths,
    )


def _describe(pair: TurboPair) -> str:
    on, off = pair.on.summary, pair.off.summary
    return (
        f"round {pair.turn + 1}, {pair.task}, {pair.load.name}: on {on.tokens_per_second:.1f}, "
        f"off {off.tokens_per_second:.1f} tok/s, {pair.different} answers different, "
        f"{on.errors + off.errors} errors"
    )


def summarise_gains(pairs: Sequence[TurboPair]) -> tuple[TurboGain, ...]:
    """Gains of each task and load, in the order of first appearance.

    Raises:
        RuntimeError: a task and load in which no pair of rounds gave tokens.
    """
    lanes = dict.fromkeys((pair.task, pair.load) for pair in pairs)
    return tuple(_gain([p for p in pairs if (p.task, p.load) == lane]) for lane in lanes)


def _gain(own: Sequence[TurboPair]) -> TurboGain:
    ratios = [pair.ratio for pair in own if pair.ratio is not None]
    if not ratios:
        first = own[0].off.summary.first_errors
        raise RuntimeError(f"{own[0].task}, {own[0].load.name}: no round gave a token: {first}")
    return TurboGain(
        task=own[0].task,
        load=own[0].load,
        pairs=len(own),
        on=median(pair.on.summary.tokens_per_second for pair in own),
        off=median(pair.off.summary.tokens_per_second for pair in own),
        ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        tokens_per_step=median_of(pair.on.tokens_per_step for pair in own),
        depths=_together([pair.on for pair in own]),
        on_times=_times([pair.on.summary for pair in own]),
        off_times=_times([pair.off.summary for pair in own]),
        different=sum(pair.different for pair in own),
        errors=sum(pair.on.summary.errors + pair.off.summary.errors for pair in own),
    )


def _together(sides: Sequence[DraftingSide]) -> tuple[Depth, ...]:
    drafted: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for depth in (depth for side in sides for depth in side.depths):
        drafted[depth.depth] += depth.drafted
        accepted[depth.depth] += depth.accepted
    return tuple(Depth(depth, drafted[depth], accepted[depth]) for depth in sorted(drafted))


def _times(rounds: Sequence[Summary]) -> dict[str, float | None]:
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    return {name: median_of(getattr(summary, name) for summary in rounds) for name in names}


TURBO_HEADER = (
    "task", "load", "on tok/s", "off tok/s", "on / off", "lowest", "tok/step", "accepted by depth",
    "TTFT p50 ms, on / off", "p99", "between events p50 ms, on / off", "p99", "different", "errors",
)  # fmt: skip


def turbo_table(result: TurboResult) -> str:
    return table(TURBO_HEADER, [_row(gain) for gain in result.gains])


def _row(gain: TurboGain) -> list[str]:
    def both(name: str) -> str:
        on, off = gain.on_times[name], gain.off_times[name]
        return f"{number(on, 0, MILLI)} / {number(off, 0, MILLI)}"

    accepted = [number(ratio(depth.accepted, depth.drafted), 2) for depth in gain.depths]
    return [
        gain.task,
        gain.load.name,
        number(gain.on),
        number(gain.off),
        number(gain.ratio, 2),
        number(gain.lowest, 2),
        number(gain.tokens_per_step, 2),
        " ".join(accepted) or "-",
        both("ttft_p50"),
        both("ttft_p99"),
        both("itl_p50"),
        both("itl_p99"),
        str(gain.different),
        str(gain.errors),
    ]
