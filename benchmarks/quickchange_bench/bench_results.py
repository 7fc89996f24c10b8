"""Results of a benchmark run as plain frozen data, written as JSON of the same fields.

Times in seconds, memory in bytes. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from quickchange_bench.summary_stats import median_of, percentile, ratio, spread

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ClientCompletion:
    """One request's outcome, on the client's own clock.

    `gaps` are the times between successive events that carry text; a server that sends several
    tokens in one event is measured by events, as its reader sees them.
    """

    index: int
    adapter: int | None
    started: float
    finished: float
    first_token: float | None
    gaps: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int
    text: str
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    @property
    def seconds(self) -> float:
        return self.finished - self.started


@dataclass(frozen=True, slots=True)
class Load:
    """Arrival of requests: closed loop (workers) or open loop (rate); one of the two is set."""

    workers: int | None = None
    rate: float | None = None  # requests per second, Poisson
    busy: int = 0  # other processes that keep the cores busy meanwhile

    def __post_init__(self) -> None:
        if (self.workers is None) == (self.rate is None):
            raise ValueError("a load has either workers (closed loop) or a rate (open loop)")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"{self.workers} workers: at least 1 is needed")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"a rate of {self.rate} requests a second: it must be above 0")
        if self.busy < 0:
            raise ValueError(f"{self.busy} busy processes: it must be 0 or more")

    @property
    def name(self) -> str:
        load = f"{self.workers} concurrent" if self.rate is None else f"{self.rate:g} req/s"
        return f"{load}, {self.busy} busy" if self.busy else load


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """Resource use over one measured stretch. `*_cores` are CPU seconds per second."""

    server_cpu_seconds: float
    server_cores: float
    client_cores: float
    other_cores: float  # used by the rest of the machine: near 0 on a quiet one
    peak_rss: int | None  # bytes, the processes' own peaks summed: shared pages count repeatedly
    pss: int | None  # bytes now, shared pages counted once


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one round at one load. None: not measured."""

    requests: int
    errors: int
    seconds: float
    prompt_tokens: float | None  # mean a request, as the server counts
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    ttft_p50: float | None
    ttft_p90: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    e2e_p50: float | None
    e2e_p90: float | None
    e2e_p99: float | None
    tokens_per_cpu_second: float | None = None
    server_cores: float | None = None
    client_cores: float | None = None
    other_cores: float | None = None
    peak_rss: float | None = None
    pss: float | None = None
    first_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """A summary with its load and round."""

    load: Load
    round: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class Median:
    """Medians over the rounds of one load, field by field."""

    load: Load
    rounds: int
    spread: float | None  # spread of tokens/s: (largest - smallest) / median
    errors: int  # in all rounds together
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """Options of the workload, as given."""

    adapters: int
    popularity: str | None
    prompt_tokens: str
    output_tokens: str
    requests_per_worker: int | None
    requests: int | None
    warmup: int
    repeat: int
    seed: int


@dataclass(frozen=True, slots=True)
class MachineInfo:
    cpu: str
    cores: int
    memory: int  # bytes
    system: str
    python: str
    gpu: str | None


@dataclass(frozen=True, slots=True)
class ServingResult:
    """Figures of a run with all that a published figure has to name."""

    label: str
    model: str
    dialect: str
    workload: WorkloadSpec
    machine: MachineInfo
    commit: str | None
    command: str
    started: str  # ISO 8601, UTC
    points: tuple[Point, ...]
    medians: tuple[Median, ...]
    kind: str = "serving"
    version: int = field(default=SCHEMA_VERSION)


def summarise(completions: Sequence[ClientCompletion], use: ResourceUse | None) -> Summary:
    """Figures of one round; failed requests count as errors and in nothing else.

    Raises:
        ValueError: there is no completion to summarise.
    """
    if not completions:
        raise ValueError("a round without a request can't be summarised")
    good = [c for c in completions if c.error is None]
    seconds = max(c.finished for c in completions) - min(c.started for c in completions)
    tokens = sum(c.output_tokens for c in good)
    ttft = [c.ttft for c in good if c.ttft is not None]
    gaps = [gap for c in good for gap in c.gaps]
    e2e = [c.seconds for c in good]
    prompts = [c.prompt_tokens for c in good if c.prompt_tokens is not None]
    failed = [c.error for c in completions if c.error is not None]
    return Summary(
        requests=len(completions),
        errors=len(failed),
        seconds=seconds,
        prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        output_tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        ttft_p50=percentile(ttft, 50),
        ttft_p90=percentile(ttft, 90),
        ttft_p99=percentile(ttft, 99),
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        e2e_p50=percentile(e2e, 50),
        e2e_p90=percentile(e2e, 90),
        e2e_p99=percentile(e2e, 99),
        tokens_per_cpu_second=None if use is None else ratio(tokens, use.server_cpu_seconds),
        server_cores=None if use is None else use.server_cores,
        client_cores=None if use is None else use.client_cores,
        other_cores=None if use is None else use.other_cores,
        peak_rss=None if use is None else use.peak_rss,
        pss=None if use is None else use.pss,
        first_errors=tuple(dict.fromkeys(failed))[:3],
    )


def medians(points: Sequence[Point]) -> tuple[Median, ...]:
    """Medians of each load, in the order of first appearance."""
    numeric = [f.name for f in fields(Summary) if f.name != "first_errors"]
    merged = []
    for load in dict.fromkeys(point.load for point in points):
        rounds = [point.summary for point in points if point.load == load]
        merged.append(
            Median(
                load=load,
                rounds=len(rounds),
                spread=spread([s.tokens_per_second for s in rounds]),
                errors=sum(s.errors for s in rounds),
                values={name: median_of(getattr(s, name) for s in rounds) for name in numeric},
            )
        )
    return tuple(merged)
