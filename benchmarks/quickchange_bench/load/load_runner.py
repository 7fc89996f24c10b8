"""Load on a running server, measured: closed loop or open loop, in repeated rounds.

A closed loop has N workers that each send a request, wait for its end and send the next. An open
loop sends at Poisson times whatever the server does. Rounds go over all loads before they repeat,
so that a machine that slows down meets every load alike.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from quickchange_bench.bench_results import ClientCompletion, Load, Point, Summary, summarise
from quickchange_bench.load.busy_neighbours import busy_neighbours
from quickchange_bench.load.load_client import Client
from quickchange_bench.load.process_usage import ResourceProbe
from quickchange_bench.load.workload import ROUND_STRIDE, Fixed, Request, Workload

WARMUP_TOKENS = 4
LOAD_STRIDE = 10_000  # request indices between two loads of a round


async def closed_loop(
    client: Client, requests: Iterable[Request], workers: int
) -> list[ClientCompletion]:
    """Send all requests, `workers` at a time; outcomes worker by worker."""
    queue = iter(requests)

    async def worker() -> list[ClientCompletion]:
        return [await client.complete(request) for request in queue]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker()) for _ in range(workers)]
    return [completion for task in tasks for completion in task.result()]


async def open_loop(
    client: Client, requests: Iterable[Request], rate: float, seed: int
) -> list[ClientCompletion]:
    """Send all requests at the times of a Poisson process of `rate` per second, in order."""
    clock = asyncio.get_running_loop()
    rng = random.Random(f"arrivals {seed}")
    due = clock.time()
    tasks: list[asyncio.Task[ClientCompletion]] = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            due += rng.expovariate(rate)  # absolute times: a late wake-up delays nothing after it
            await asyncio.sleep(max(due - clock.time(), 0))
            tasks.append(group.create_task(client.complete(request)))
    return [task.result() for task in tasks]


@dataclass(frozen=True)
class LoadPlan:
    """The loads to try, how often, and with how many requests each.

    A closed loop takes `requests_per_worker` for every worker, at least `min_requests`; `requests`,
    where given, is the number at every load instead, and an open loop needs it.
    """

    workload: Workload
    loads: tuple[Load, ...]
    repeat: int = 3
    requests: int | None = None
    requests_per_worker: int = 2
    min_requests: int = 4
    warmup: int = 8

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat {self.repeat}: at least 1 round is needed")
        if self.requests is not None and self.requests < 1:
            raise ValueError(f"requests {self.requests}: at least 1 is needed")
        for load in self.loads:
            if load.rate is not None and self.requests is None:
                raise ValueError("a rate needs a number of requests: give --requests")
            if self.count(load) > LOAD_STRIDE:
                raise ValueError(f"{self.count(load)} requests at a load: {LOAD_STRIDE} at most")

    def count(self, load: Load) -> int:
        """Number of requests in one round at this load."""
        if self.requests is not None:
            return self.requests
        return max(self.min_requests, self.requests_per_worker * (load.workers or 1))

    def start(self, turn: int, place: int) -> int:
        """Index of the round's first request; no two rounds share one."""
        return (turn + 1) * ROUND_STRIDE + place * LOAD_STRIDE

    def warmup_requests(self, turn: int, place: int) -> list[Request]:
        """Short requests over the same adapters, at indices just below the measured ones."""
        first = self.start(turn, place)
        short = replace(self.workload, output_tokens=Fixed(WARMUP_TOKENS))
        return list(short.requests(first - self.warmup, self.warmup))


async def measure(
    client: Client, plan: LoadPlan, load: Load, *, turn: int, place: int, pid: int | None
) -> Summary:
    """Measure one round at one load, after a warm-up that is not counted."""
    if warmup := plan.warmup_requests(turn, place):
        await closed_loop(client, warmup, load.workers or 1)
    requests = plan.workload.requests(plan.start(turn, place), plan.count(load))
    with busy_neighbours(load.busy):
        probe = None if pid is None else ResourceProbe(pid)
        if load.rate is None:
            done = await closed_loop(client, requests, load.workers or 1)
        else:
            done = await open_loop(client, requests, load.rate, plan.workload.seed + turn)
        return summarise(done, None if probe is None else probe.stop())


async def run_plan(
    client: Client,
    plan: LoadPlan,
    *,
    pid: int | None = None,
    turns: Sequence[int] | None = None,
    progress: Callable[[Point], None] = lambda _: None,
) -> list[Point]:
    """Run every round of the plan, or those in `turns`. `progress` is called as each ends."""
    points = []
    for turn in range(plan.repeat) if turns is None else turns:
        for place, load in enumerate(plan.loads):
            summary = await measure(client, plan, load, turn=turn, place=place, pid=pid)
            points.append(Point(load=load, round=turn, summary=summary))
            progress(points[-1])
    return points
