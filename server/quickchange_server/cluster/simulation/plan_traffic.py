"""`quickchange plan --traffic`: what a trace would meet on many replicas, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from quickchange_server.cluster.simulation.replica_model import ReplicaModel, read_model
from quickchange_server.cluster.simulation.simulation import (
    POLICIES,
    ClusterModel,
    Outcome,
    PolicyName,
    simulate,
)
from quickchange_server.cluster.simulation.traffic import TracedRequest, traffic
from quickchange_server.engine.memory.budget import size
from quickchange_server.engine.memory.footprint import adapter_pages, held_dtype, pages_bytes
from quickchange_server.entrypoints.gpu_names import GPUS
from quickchange_server.entrypoints.plan_command import memory_of, ranks_of
from quickchange_server.errors import SettingError
from quickchange_server.protocol import Prices

_HEADER = (
    "routing",
    "on device",
    "2nd half",
    "loads a request",
    "from store",
    "first token p50",
    "p99",
    "busiest",
    "most requests",
)
_NOTE = """\
on device: requests for adapters whose replica had the adapter there. loads a request: from the
store. busiest, most requests: of one replica, in parts of the mean."""


def plan_traffic(
    given: Mapping[str, Any],
    *,
    trace: str,
    replicas: int,
    policy: str | None,
    measured: str | None,
    gpu: str | None,
    ranks: str | None,
) -> str:
    """The table. measured: file of a replica's model; None: one by the GPU's data sheet.

    Raises QuickchangeError and OSError, which say what to change.
    """
    policies = _policies(policy)
    if replicas < 1:
        raise SettingError(f"--replicas {replicas}: give at least 1", param="replicas")
    if measured is not None:
        model, source = read_model(Path(measured)), f"steps as {measured} has them"
    else:
        model, source = by_data_sheet(given, gpu=gpu, ranks=ranks)
    requests = traffic(trace)
    check_lengths(requests, model)
    cluster = ClusterModel(replica=model, replicas=replicas)
    outcomes = [simulate(requests, cluster, name) for name in policies]
    return "\n".join([_described(requests, cluster, source), "", table(outcomes, model), _NOTE])


def by_data_sheet(
    given: Mapping[str, Any], *, gpu: str | None, ranks: str | None
) -> tuple[ReplicaModel, str]:
    """The model of a replica with the settings `given` on a known GPU, and what it rests on.

    A step takes as long as the base's weights take to be read or its products to be made; adapters
    in it and the context of its sequences are read as well. No engine is faster.
    """
    known = None if gpu is None else GPUS.get(gpu.lower())
    if known is None:
        raise SettingError(
            "--traffic needs prices of steps: give --measured FILE, or --gpu with one of "
            f"{', '.join(GPUS)}",
            param="gpu",
        )
    settings, base, found = memory_of(given, gpu=gpu, ranks=ranks)
    weights = sum(parameter.numel() for parameter in base.model.module.parameters())
    rank = ranks_of(ranks)[0]
    dtype = held_dtype(base.model, settings)
    adapter = max(pages_bytes(adapter_pages(base.model, dtype, rank), dtype), 1)
    caches = found.caches
    model = ReplicaModel(
        prices=_prices(found.base / known.bandwidth, 2 * weights / known.operations, settings),
        adapter_bytes=adapter,
        adapter_device_bytes=found.arena,
        adapter_host_bytes=settings.adapter_host_bytes,
        kv_tokens=caches.blocks.num_blocks * caches.blocks.block_size,
        max_sequences=settings.step_sequences,
        max_batch_tokens=settings.batch_tokens,
        adapter_seconds=adapter / known.bandwidth,
        context_seconds=caches.block_bytes / caches.blocks.block_size / known.bandwidth,
    )
    return (
        model,
        f"steps by the data sheet of {gpu}, the least they can take; adapters of rank {rank}",
    )


def _prices(read: float, row: float, settings: Any) -> Prices:
    rows = {1, settings.batch_tokens, min(max(round(read / row), 1), settings.batch_tokens)}
    return tuple((count, max(read, row * count)) for count in sorted(rows))


def check_lengths(requests: Iterable[TracedRequest], model: ReplicaModel) -> None:
    """Raise SettingError for a request that has no room in a replica's KV cache."""
    for number, request in enumerate(requests, 1):
        if request.prompt + request.output > model.kv_tokens:
            raise SettingError(
                f"--traffic: request {number} in order of time has {request.prompt} + "
                f"{request.output} tokens, and a replica's KV cache room for {model.kv_tokens}; "
                "leave it out, or plan for larger replicas",
                param="traffic",
            )


def table(outcomes: Sequence[Outcome], model: ReplicaModel) -> str:
    """One line for each outcome."""
    rows = [_HEADER, *(_row(outcome, model) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(outcome: Outcome, model: ReplicaModel) -> tuple[str, ...]:
    requests = len(outcome.first_tokens)
    return (
        outcome.policy,
        f"{outcome.hit_rate:.1%}",
        f"{outcome.late_hit_rate:.1%}",
        f"{outcome.store_loads / requests:.3f}",
        size(outcome.store_loads * model.adapter_bytes),
        _time(outcome.first_token(0.5)),
        _time(outcome.first_token(0.99)),
        f"{outcome.spread:.2f}",
        f"{max(outcome.placed) / fmean(outcome.placed):.2f}",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _described(requests: Sequence[TracedRequest], cluster: ClusterModel, source: str) -> str:
    model = cluster.replica
    seconds = requests[-1].time - requests[0].time
    adapters = len({request.adapter for request in requests} - {""})
    prompt = fmean(request.prompt for request in requests)
    output = fmean(request.output for request in requests)
    steps = model.price_table()
    most = model.max_batch_tokens
    return (
        f"{len(requests)} requests in {seconds:.0f} s for {adapters} adapters of "
        f"{size(model.adapter_bytes)}; {prompt:.0f} tokens in and {output:.0f} out on average\n"
        f"{cluster.replicas} replicas, each with room for {model.device_room} adapters on the "
        f"device and {model.host_room} on the host, {model.kv_tokens} tokens of KV cache\n"
        f"{source}: {steps[1] * 1e3:.2f} ms for 1 row, {steps[most] * 1e3:.2f} ms for {most}"
    )


def _policies(given: str | None) -> tuple[PolicyName, ...]:
    if given is None:
        return POLICIES
    chosen = tuple(name for name in POLICIES if name == given)
    if not chosen:
        raise SettingError(
            f"--policy {given}: give one of {', '.join(POLICIES)}, or none for all",
            param="policy",
        )
    return chosen
