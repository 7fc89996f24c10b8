"""The plan for many replicas, held against a server: the same trace replayed on both.

`measure_replica` starts one engine and writes what `quickchange plan --measured` reads: prices of
steps, budgets, the time of loads. `check_plan` replays a trace over HTTP, open loop, and beside it
on the plan's models. What HTTP itself takes is measured with lone requests and added to the model.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from quickchange_bench.load.load_client import Client, ServedNames
from quickchange_bench.load.workload import Request
from quickchange_bench.report_tables import table
from quickchange_bench.summary_stats import percentile
from quickchange_server.cluster.simulation.plan_traffic import check_lengths
from quickchange_server.cluster.simulation.replica_model import ReplicaModel, of_ready
from quickchange_server.cluster.simulation.simulation import ClusterModel, simulate
from quickchange_server.cluster.simulation.traffic import TracedRequest
from quickchange_server.config import Settings
from quickchange_server.engine_client.client import EngineClient
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.observability.metrics import Metrics
from quickchange_store.store import Store

LOADED = 16  # adapters that are loaded to time it
LONE = 5  # requests that are answered alone
TOKENS = (5, 200)  # ids that prompts are made of: every vocabulary has them
_LOAD_SECONDS = "quickchange_adapter_load_seconds"
_LOAD_LIMIT_SECONDS = 60.0


async def measure_replica(settings: Settings) -> ReplicaModel:
    """The model of one engine with these settings, with the time and size of its loads.

    Raises RuntimeError where there is no adapter, or one could not be loaded.
    """
    entries = Store.at(settings.store).snapshot().entries.values()
    digests = [entry.versions[entry.current].digest for entry in entries][:LOADED]
    if not digests:
        raise RuntimeError(f"{settings.store} has no adapter; add some, to time their loads")
    metrics = Metrics(settings)
    client = EngineClient(settings, metrics, partial(LocalEngines, main=engine_main))
    ready = await client.start()
    try:
        for digest in digests:
            client.prefetch(digest)
            await _on_device(client, digest)
        sizes = [client.residency[d].bytes for d in digests if d in client.residency]
    finally:
        await client.close(0.0)
    return of_ready(
        ready,
        adapter_bytes=round(fmean(sizes)),
        max_sequences=settings.step_sequences,
        max_batch_tokens=settings.batch_tokens,
        store_seconds=_mean_load(metrics, "host"),
        copy_seconds=_mean_load(metrics, "device"),
    )


async def _on_device(client: EngineClient, digest: str) -> None:
    end = time.monotonic() + _LOAD_LIMIT_SECONDS
    while (found := client.residency.get(digest)) is None or found.tier != "device":
        if time.monotonic() > end:
            raise RuntimeError(f"adapter {digest[:12]} is not on the device: see the log")
        await asyncio.sleep(0.005)


def _mean_load(metrics: Metrics, tier: str) -> float:
    total, count = (
        metrics.registry.get_sample_value(f"{_LOAD_SECONDS}_{what}", {"tier": tier}) or 0.0
        for what in ("sum", "count")
    )
    return total / count if count else 0.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a trace met on a server."""

    first_tokens: tuple[float, ...]  # seconds from the request's time
    lone_seconds: float  # to the first token of one row that is computed alone
    hit_rate: float | None  # None: the server routes nothing
    loads: float  # from the store
    errors: tuple[str, ...]


async def replay(url: str, base: str, requests: Sequence[TracedRequest]) -> Replayed:
    """Send each request at its time, whatever the others do."""
    names = tuple(sorted({request.adapter for request in requests} - {""}))
    async with Client(url, ServedNames(base, names), connections=4096) as client:
        lone = [await client.complete(Request(-1, (TOKENS[0],), 1, None)) for _ in range(LONE)]
        before = await _series(client)
        begin, first = time.perf_counter() + 0.2, requests[0].time
        due = [begin + request.time - first for request in requests]
        answers = await asyncio.gather(
            *(
                _at(when, client, Request(n, _prompt(n, r), r.output, _index(names, r.adapter)))
                for n, (when, r) in enumerate(zip(due, requests, strict=True))
            )
        )
        after = await _series(client)
    return Replayed(
        tuple(a.first_token - d for a, d in zip(answers, due, strict=True) if a.first_token),
        median(a.first_token - a.started for a in lone if a.first_token),
        _hit_rate(before, after),
        _gain(before, after, "quickchange_adapter_loads_total", tier="host"),
        tuple(answer.error for answer in answers if answer.error),
    )


async def _at(when: float, client: Client, request: Request) -> Any:
    await asyncio.sleep(max(when - time.perf_counter(), 0))
    return await client.complete(request)


def _index(names: Sequence[str], adapter: str) -> int | None:
    return names.index(adapter) if adapter else None


def _prompt(number: int, request: TracedRequest) -> tuple[int, ...]:
    shared, own = random.Random(request.prefix), random.Random(number)
    return tuple(
        (shared if place < request.prefix_tokens else own).randrange(*TOKENS)
        for place in range(request.prompt)
    )


Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


async def _series(client: Client) -> Series:
    response = await client.http.get("/metrics")
    response.raise_for_status()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def _gain(before: Series, after: Series, name: str, **labels: str) -> float:
    return sum(
        value - before.get(key, 0.0)
        for key, value in after.items()
        if key[0] == name and labels.items() <= set(key[1])
    )


def _hit_rate(before: Series, after: Series) -> float | None:
    name = "quickchange_routing_total"
    total = _gain(before, after, name)
    return _gain(before, after, name, result="device") / total if total else None


def check_plan(requests: Sequence[TracedRequest], cluster: ClusterModel, replayed: Replayed) -> str:
    """A table of what was measured beside what the plan says."""
    check_lengths(requests, cluster.replica)
    outcome = simulate(requests, cluster, "affinity")
    beside = max(replayed.lone_seconds - cluster.replica.price_table()[1], 0.0)
    rows = [
        [
            f"first token p{q}, ms",
            *_both(
                percentile(replayed.first_tokens, q), outcome.first_token(q / 100) + beside, 1e3
            ),
        ]
        for q in (50, 90, 99)
    ]
    rows.append(["on device", *_both(replayed.hit_rate, outcome.hit_rate)])
    rows.append(["loads from the store", *_both(replayed.loads, float(outcome.store_loads))])
    note = f"{beside * 1e3:.1f} ms of the model's first tokens are HTTP's and the pipe's, measured"
    failed = f"\n{len(replayed.errors)} failed: {replayed.errors[0]}" if replayed.errors else ""
    return table(["", "measured", "model", "model / measured"], rows) + f"\n{note}{failed}"


def _both(measured: float | None, model: float, scale: float = 1.0) -> Iterable[str]:
    if measured is None:
        return "-", f"{model * scale:.3g}", "-"
    ratio = f"{model / measured:.2f}" if measured else "-"
    return f"{measured * scale:.3g}", f"{model * scale:.3g}", ratio


def cluster_of(model: ReplicaModel, replicas: int, ingresses: int) -> ClusterModel:
    """The cluster that is planned: reports come about twice a second."""
    return ClusterModel(replica=model, replicas=replicas, ingresses=ingresses, report_seconds=0.5)
