"""TEMPORARY stand-ins for the metrics that other domains export."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "quickchange_"


@contextmanager
def stand_ins(registry: CollectorRegistry, existing: set[str]) -> Iterator[None]:
    children: list[Any] = []

    def counter(name: str, *labels: tuple[str, str]) -> None:
        for full in (PREFIX + name,):
            if full in existing:
                return
            made = Counter(full, "stand-in", sorted({k for k, _ in labels}), registry=registry)
            keys = sorted({k for k, _ in labels})
            combos: list[dict[str, str]] = [{}]
            for key in keys:
                combos = [{**c, key: v} for c in combos for k, v in labels if k == key]
            for c in combos:
                child = made.labels(**c) if keys else made
                children.append(child.inc)

    def histogram(name: str, *labels: tuple[str, str]) -> None:
        if PREFIX + name in existing:
            return
        keys = sorted({k for k, _ in labels})
        made = Histogram(PREFIX + name, "stand-in", keys, registry=registry)
        combos: list[dict[str, str]] = [{}]
        for key in keys:
            combos = [{**c, key: v} for c in combos for k, v in labels if k == key]
        for c in combos:
            child = made.labels(**c) if keys else made
            children.append(lambda child=child: child.observe(0.02))

    t = [("tenant", "acme"), ("tenant", "globex")]
    e = [("experiment", "tone"), ("variant", "a"), ("variant", "b")]
    o = [("outcome", "stop"), ("outcome", "refused")]
    counter("tenant_requests_total", *t, *o)
    counter("tenant_tokens_total", *t, ("kind", "prompt"), ("kind", "completion"))
    counter("tenant_limited_total", *t, ("limit", "requests"))
    counter("experiment_requests_total", *e, *o)
    counter("experiment_tokens_total", *e)
    counter("experiment_outcomes_total", *e, ("name", "liked"))
    counter("experiment_shadow_requests_total", *e, *o)
    histogram("experiment_request_seconds", *e)
    histogram("experiment_first_token_seconds", *e)
    histogram("structured_compile_seconds")
    histogram("structured_mask_seconds")
    counter("structured_requests_total", ("kind", "regex"))
    histogram("storage_commit_seconds")
    counter("storage_lost_total")
    if PREFIX + "storage_queue" not in existing:
        Gauge(PREFIX + "storage_queue", "stand-in", registry=registry)
    commits: Any = registry._names_to_collectors.get(PREFIX + "storage_commit_seconds")
    if commits is not None:
        children.append(lambda: commits.observe(0.01))
    done = threading.Event()

    def move() -> None:
        while not done.wait(0.1):
            for child in children:
                child()

    thread = threading.Thread(target=move)
    thread.start()
    yield
    done.set()
    thread.join()
