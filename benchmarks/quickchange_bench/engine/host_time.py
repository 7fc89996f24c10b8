"""Host time of decode steps: the engine on a simulated device, whose every step takes T seconds.

All that the host does in a step is done: scheduling, inputs, the sampler's tables, packing and
refilling of a graph's inputs, results, the report and its way into the pipe. What the device would
do is left out: graphs are captured on the CPU, and their replay does nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, Protocol
from unittest import mock

import torch

from quickchange_bench.gpu.gpu_engine import random_llama
from quickchange_bench.models.random_base import LlamaShape
from quickchange_bench.report_tables import table
from quickchange_server.config import Settings
from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.model_runner import HeadPlan, Runner
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.engine.step_results import Flight, Ran
from quickchange_server.model.graphs.cuda_graphs import Outputs
from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.protocol import AdapterMoved, Component, SamplingParams, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

WARM_UP, STEPS = 10, 100
PROMPT = 100  # tokens
_SHAPE = LlamaShape(32, 64, 1, 2, 1, 64)  # of a model that is captured and never run
_RANK = 8
_DEADLINE = 60.0  # seconds until all sequences decode
_PARTS = ("schedule", "launch", "results", "settle", "send", "all")


@dataclass(frozen=True, slots=True)
class HostLoad:
    """Decoding sequences, each under an adapter of its own or all plain."""

    sequences: int
    adapters: bool
    depth: int  # steps in flight


@dataclass(frozen=True, slots=True)
class HostTime:
    """Medians over steady decode steps, in seconds."""

    load: HostLoad
    device: float  # T
    period: float  # from one report to the next
    host: float  # the engine thread's own time
    parts: dict[str, float]  # of it, by what it was spent on


class Clock(Protocol):
    """The time in which the engine and the device run."""

    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...


class WallClock:
    """The real time: that of this thread, of all that shares its cores, and of waking up."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(moment - self.now(), 0.0))


class OwnClock:
    """What a clock would show if this thread had its core for itself: its own time, and what it
    has waited for the device. Nobody sleeps."""

    def __init__(self) -> None:
        self._waited = 0.0

    def now(self) -> float:
        return time.thread_time() + self._waited

    def wait_until(self, moment: float) -> None:
        self._waited += max(moment - self.now(), 0.0)


class SimulatedDevice:
    """Computes steps in order, each in the same time, beside the host."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.seconds, self.clock = seconds, clock
        self._free = 0.0  # when all it was given is done

    def launch(self) -> float:
        """Give it one more step; returns the time at which that is done."""
        self._free = max(self._free, self.clock.now()) + self.seconds
        return self._free


@dataclass(frozen=True, slots=True)
class _Watch:
    """CPU time of the engine's thread by part. Time asleep does not count."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.spent[part] += time.thread_time() - started

        return timed


class _SimulatedFlight:
    """A flight whose results are there when the simulated device has got so far."""

    def __init__(self, flight: Flight, device: SimulatedDevice, watch: _Watch) -> None:
        self.plan, self.faults = flight.plan, flight.faults
        self._device, self._done = device, device.launch()
        self._ran = watch.timed("results", flight.ran)

    def ran(self) -> Ran:
        self._device.clock.wait_until(self._done)
        ran: Ran = self._ran()
        return ran


class _SimulatedRunner:
    """A runner on the simulated device."""

    def __init__(self, runner: Runner, device: SimulatedDevice, watch: _Watch) -> None:
        self._launch = watch.timed("launch", runner.launch)
        self._device, self._watch = device, watch

    def launch(self, plan: Sequence[Scheduled], heads: HeadPlan) -> _SimulatedFlight:
        return _SimulatedFlight(self._launch(plan, heads), self._device, self._watch)


def host_times(
    loads: Sequence[HostLoad],
    seconds: float,
    *,
    steps: int = STEPS,
    clock: Callable[[], Clock] = OwnClock,
) -> Iterator[HostTime]:
    """Measure each load on a device that takes `seconds` a step."""
    model = random_llama(_SHAPE, torch.device("cpu"), torch.float32)
    for load in loads:
        yield _measured(model, load, SimulatedDevice(seconds, clock()), steps)


def host_table(found: Sequence[HostTime]) -> str:
    """Markdown: period over the device's time, host time, and the host's by part; in ms."""
    rows = []
    for one in found:
        load = one.load
        own = [*one.parts.values(), one.host - sum(one.parts.values())]
        rows.append(
            [
                f"{load.sequences}, {'adapters' if load.adapters else 'plain'}",
                str(load.depth),
                *(f"{1e3 * s:.2f}" for s in (one.period - one.device, one.host, *own)),
            ]
        )
    header = ("sequences", "in flight", "period - T", "host", *_PARTS[:-1], "rest")
    return table(header, rows)


def _measured(model: LoadedModel, load: HostLoad, device: SimulatedDevice, steps: int) -> HostTime:
    watch, now = _Watch(), device.clock.now
    with mock.patch.object(model_runner, "capture_for", return_value=_captured):
        engine = _engine(model, load)
    try:
        _let_decode(engine, model, load)
        with _simulated(engine, device, watch), _nowhere() as pipe:
            send = watch.timed("send", pipe.send)
            for _ in range(WARM_UP):
                _step(engine, send)
            reports, spent = [now()], []
            for _ in range(steps):
                watch.spent.update(dict.fromkeys(_PARTS, 0.0))
                watch.timed("all", _step)(engine, send)
                reports.append(now())
                spent.append(dict(watch.spent))
    finally:
        engine.close()
    periods = [after - before for before, after in pairwise(reports)]
    parts = {part: statistics.median(one[part] for one in spent) for part in _PARTS}
    return HostTime(load, device.seconds, statistics.median(periods), parts.pop("all"), parts)


def _captured(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A `Capture` whose graphs take no time. All that they give is one: sound, as token 1."""
    outputs = tuple([torch.ones_like(output) for output in compute()])
    return (lambda: None), outputs


def _step(engine: Engine, send: Callable[[Any], Any]) -> None:
    """What the engine's process does between two polls of its channel."""
    for move in engine.poll_adapters():
        send(move)
    report = engine.step()
    if report is None or any(delta.error for delta in report.deltas):
        raise RuntimeError(f"a steady decode step reported {report}")
    send(report)


@contextmanager
def _simulated(engine: Engine, device: SimulatedDevice, watch: _Watch) -> Iterator[None]:
    """Let the engine's steps run on the simulated device."""
    scheduler = engine.scheduler
    with (
        mock.patch.object(engine, "_runner", _SimulatedRunner(engine._runner, device, watch)),
        mock.patch.object(scheduler, "schedule", watch.timed("schedule", scheduler.schedule)),
        mock.patch.object(engine, "_advance", watch.timed("settle", engine._advance)),
    ):
        yield


@contextmanager
def _nowhere() -> Iterator[Connection]:
    """A channel that pickles, writes and keeps nothing."""
    with Connection(os.open(os.devnull, os.O_WRONLY), readable=False) as pipe:
        yield pipe


def _engine(model: LoadedModel, load: HostLoad) -> Engine:
    length = PROMPT + 10 * (WARM_UP + STEPS)
    settings = Settings.model_validate(
        {
            "model": "random",
            "store": ".",
            "dtype": "float32",
            "max_sequences": load.sequences,
            "max_batch_tokens": 1024,
            "max_model_len": length,
            "kv_cache_bytes": 64 * 1024 * load.sequences * length // 16,
            "adapters": load.adapters,
            "adapter_device_bytes": 1 << 26,
            "adapter_host_bytes": 1 << 28,
            "turbo": False,
        }
    )
    return Engine(
        model,
        settings,
        load_adapter=lambda digest, _: _adapter(model, digest),
        on_wake=lambda: None,
        depth=load.depth,
    )


def _adapter(model: LoadedModel, digest: str) -> CanonicalAdapter:
    updates = {
        member.path: LowRankUpdate(
            torch.zeros(_RANK, group.in_features), torch.zeros(member.width, _RANK), 1.0
        )
        for group in model.groups
        if group.kind == "linear" and group.source == "input"
        for member in group.members
    }
    return CanonicalAdapter("LORA", digest, updates)


def _let_decode(engine: Engine, model: LoadedModel, load: HostLoad) -> None:
    """Load the load's adapters, submit its requests, and step until all of them decode."""
    end = time.monotonic() + _DEADLINE
    names = [f"adapter-{row}" for row in range(load.sequences if load.adapters else 0)]
    _bring(engine, names, end)
    for row in range(load.sequences):
        prompt = tuple((7 * row + place) % model.vocabulary for place in range(PROMPT))
        adapters = (Component(names[row]),) if names else ()
        sampling = SamplingParams(max_tokens=10 * (WARM_UP + STEPS), temperature=0.7)
        engine.submit(Submit(str(row), prompt, sampling, adapters, seed=row))
    running = engine.scheduler.running
    while len(running) < load.sequences or any(s.remaining > 1 for s in running):
        if time.monotonic() > end:
            raise TimeoutError(f"{load}: not all decode after {_DEADLINE:.0f} s")
        engine.poll_adapters()
        report = engine.step()
        if report is not None and (errors := [d.error for d in report.deltas if d.error]):
            raise RuntimeError(f"{load}: {errors[0]}")


def _bring(engine: Engine, names: Sequence[str], end: float) -> None:
    """Bring adapters to the device before anything runs: the first requests, whose steps take no
    time, would be over before the last one's adapter had come beside them."""
    missing = set(names)
    for name in names:
        engine.prefetch(name, "device")
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(missing)} adapters are not loaded after {_DEADLINE:.0f} s")
        moves = engine.poll_adapters()
        missing -= {m.digest for m in moves if isinstance(m, AdapterMoved) and m.tier == "device"}
        time.sleep(0.001)
