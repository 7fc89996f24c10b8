"""Metrics of two subsystems: the database's writer, and structured output.

The writer updates its metrics on its own thread.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

COMMIT_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_COMPILE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_MASK_BUCKETS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class StorageMetrics:
    """The database writer's metrics; without a registry they are not exported."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.commit_seconds = Histogram(
            "quickchange_storage_commit_seconds",
            "Time of one transaction of the writer, from its beginning to the disk",
            buckets=COMMIT_BUCKETS,
            registry=registry,
        )
        self._queue = Gauge(
            "quickchange_storage_queue",
            "Changes that wait to be committed",
            registry=registry,
        )
        self.lost = Counter(
            "quickchange_storage_lost_total",
            "Records that were given up because the database was away for too long",
            registry=registry,
        )

    def watch(self, length: Callable[[], int]) -> None:
        """Read the queue's length at each scrape."""
        self._queue.set_function(length)


class StructuredMetrics:
    """Metrics of structured output. Labels are the kinds of `protocol.Constraint`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._compile = Histogram(
            "quickchange_structured_compile_seconds",
            "Time to judge a constraint that was not known, a first one with its process's start",
            buckets=_COMPILE_BUCKETS,
            registry=registry,
        )
        self._mask = Histogram(
            "quickchange_structured_mask_seconds",
            "Time to make all token masks of one engine step that had any",
            buckets=_MASK_BUCKETS,
            registry=registry,
        )
        self._requests = Counter(
            "quickchange_structured_requests_total",
            "Requests whose text is constrained, by kind",
            ["kind"],
            registry=registry,
        )

    def request(self, kind: str) -> None:
        self._requests.labels(kind).inc()

    def compiled(self, seconds: float) -> None:
        self._compile.observe(seconds)

    def masked(self, seconds: float) -> None:
        """Record the time of one step's token masks."""
        self._mask.observe(seconds)
