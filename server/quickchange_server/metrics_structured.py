"""Metrics of structured output: what is asked for, and what compiling and masks take."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_COMPILE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_MASK_BUCKETS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class StructuredMetrics:
    """Labels are the kinds of `messages.Constraint`: bounded."""

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
        """Of one step."""
        self._mask.observe(seconds)
