"""Metrics of all replicas of a cluster as one exposition, told apart by the label `replica`.

Each replica sends a snapshot of its own, already labelled, so that merging is mere grouping by
family. A request passes an ingress and an engine replica, and both have counters for it: each
family is told by one of the two kinds, so that sums over all series count everything once, and a
metric means in a cluster what it means on a single machine. Knows nothing of HTTP or transport.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

Kind = Literal["engine", "ingress"]

RENEW_SECONDS = 3.0  # a full registry takes some 50 ms to render

# What clients see is told by ingresses: a stream that changes its engine is one stream to them.
_INGRESS = re.compile(
    "quickchange_"
    "(requests|prompt_tokens|prompt_cached_tokens|generation_tokens|time_to_first_token_seconds"
    "|inter_token_latency_seconds|request_duration_seconds|speculation_requests"
    "|structured_(requests|compile_seconds)|(http|storage|tenant|limits|experiment)_\\w+)"
    "|gen_ai_\\w+"
)
# What a step, a device or an engine's queue shows is told by engine replicas.
_ENGINE = re.compile(
    "quickchange_"
    "(requests_(running|waiting)|queue_time_seconds|step_duration_seconds|batch_\\w+|prefill_rows"
    "|adapter_(loads|load_bytes|load_seconds|load_failures|evictions)"
    "|(kv|prefix|tier|late)_\\w+|preemptions|structured_mask_seconds"
    "|speculation_(drafted_tokens|accepted_tokens|rows|estimated_tokens|gained_tokens)"
    "|engine_\\w+)"
)
_BLOCK = re.compile(rb"^# HELP ", re.MULTILINE)  # a family's first line; no other begins so


def told_by(family: str) -> tuple[Kind, ...]:
    """The kinds of replica that tell a family of metrics."""
    if _INGRESS.fullmatch(family):
        return ("ingress",)
    return ("engine",) if _ENGINE.fullmatch(family) else ("engine", "ingress")


class _Labelled(Collector):
    """The families that this kind of replica tells, each sample with the replica's label."""

    def __init__(self, registry: Collector, replica: str, kind: Kind) -> None:
        self._registry = registry
        self._replica = {"replica": replica}
        self._kind = kind

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if self._kind in told_by(family.name):
                labelled = Metric(family.name, family.documentation, family.type, family.unit)
                labelled.samples = [
                    sample._replace(labels=sample.labels | self._replica)
                    for sample in family.samples
                ]
                yield labelled


def exposition(registry: Collector, replica: str, kind: Kind) -> bytes:
    """The replica's own series as text. It may run on any thread."""
    return generate_latest(_Labelled(registry, replica, kind))


def snapshot(registry: Collector, replica: str, kind: Kind) -> bytes:
    """The same, compressed: 470 KB of a registry with 100 adapters become some 40."""
    return zlib.compress(exposition(registry, replica, kind), 1)


def merged(own: bytes, snapshots: Iterable[bytes]) -> bytes:
    """One exposition of a replica's own text and the others' snapshots; empty ones have no series.

    Where releases differ in a family's help, the first one's is kept; a later replica's family of
    another type is left out, since no scraper reads two types.
    """
    heads: dict[bytes, bytes] = {}  # by family: its TYPE line
    families: dict[bytes, list[bytes]] = {}
    for text in (own, *(zlib.decompress(other) for other in snapshots if other)):
        for block in _BLOCK.split(text)[1:]:
            name = block[: block.index(b" ")]
            about = block.index(b"\n") + 1
            samples = block.index(b"\n", about) + 1
            kind = block[about:samples]
            if name not in families:
                heads[name] = kind
                families[name] = [b"# HELP ", block]
            elif heads[name] == kind:
                families[name].append(block[samples:])
    return b"".join(part for parts in families.values() for part in parts)


class OwnSnapshot:
    """A replica's snapshot for its reports, renewed on a thread once it is RENEW_SECONDS old."""

    def __init__(self, registry: Collector, replica: str, kind: Kind) -> None:
        self._of = (registry, replica, kind)
        self._made = -RENEW_SECONDS
        self._snapshot = b""

    async def latest(self) -> bytes:
        now = time.monotonic()
        if now - self._made >= RENEW_SECONDS:
            self._made = now
            self._snapshot = await asyncio.to_thread(snapshot, *self._of)
        return self._snapshot
