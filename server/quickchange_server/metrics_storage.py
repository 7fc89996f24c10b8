"""What the database's writer counts and times. Added to on the writer's thread."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

COMMIT_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class StorageMetrics:
    """The writer's metrics; on no registry they are kept for nobody to read."""

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
