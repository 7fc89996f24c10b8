"""Metrics of experiments, by variant; updated on the event loop.

An alert compares the shares of requests that variants got with their intended shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quickchange_server.frontend.request_observers import Assignment, Completed
from quickchange_server.observability.naming.labels import OTHER, AdapterLabels

SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
MAX_WORDS = 64  # label values for variants, and as many for outcomes, of one experiment
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ExperimentMetrics:
    """Metrics of the first `limit` experiments by name; all others are counted as "other".

    Definitions change, so variants and outcomes are bounded too: the first MAX_WORDS of an
    experiment keep their names. Those of "other" are all "other".
    """

    def __init__(self, registry: CollectorRegistry, limit: int) -> None:
        self.label = AdapterLabels(limit)
        self._variants: dict[str, set[str]] = {}  # by experiment
        self._names: dict[str, set[str]] = {}  # outcomes, by experiment
        variant = ["experiment", "variant"]
        self._requests = Counter(
            "quickchange_experiment_requests_total",
            "Requests of an experiment that ended",
            [*variant, "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "quickchange_experiment_request_seconds",
            "From arrival to the end of requests that were answered",
            variant,
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            "quickchange_experiment_first_token_seconds",
            "From arrival to the first token",
            variant,
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "quickchange_experiment_tokens_total", "Tokens generated", variant, registry=registry
        )
        self._outcomes = Counter(
            "quickchange_experiment_outcomes_total",
            "Outcomes told by clients",
            [*variant, "name"],
            registry=registry,
        )
        self._shadows = Counter(
            "quickchange_experiment_shadow_requests_total",
            "Shadow requests that ended, or were dropped because the server had other work",
            [*variant, "outcome"],
            registry=registry,
        )

    def completed(self, completed: Completed, assignment: Assignment) -> None:
        """Count a request that has ended."""
        labels = self._of(assignment.experiment, assignment.variant)
        if assignment.shadow:
            self._shadows.labels(*labels, completed.ending).inc()
            return
        self._requests.labels(*labels, completed.ending).inc()
        self._tokens.labels(*labels).inc(completed.completion_tokens)
        if completed.first_token_seconds is not None:
            self._first_token.labels(*labels).observe(completed.first_token_seconds)
        if completed.ending in ("stop", "length"):
            self._seconds.labels(*labels).observe(completed.seconds)

    def unservable(self, assignment: Assignment) -> None:
        """Count a request whose variant can't be served, so that `completed` never sees it."""
        labels = self.label(assignment.experiment), assignment.variant
        counter = self._shadows if assignment.shadow else self._requests
        counter.labels(*labels, "refused").inc()

    def outcome(self, experiment: str, variant: str, name: str) -> None:
        labels = self._of(experiment, variant)
        self._outcomes.labels(*labels, _bounded(self._names, labels[0], name)).inc()

    def shadow_dropped(self, assignment: Assignment) -> None:
        labels = self._of(assignment.experiment, assignment.variant)
        self._shadows.labels(*labels, "dropped").inc()

    def _of(self, experiment: str, variant: str) -> tuple[str, str]:
        label = self.label(experiment)
        return label, _bounded(self._variants, label, variant)


def _bounded(kept: dict[str, set[str]], experiment: str, word: str) -> str:
    if experiment == OTHER:
        return OTHER
    words = kept.setdefault(experiment, set())
    if len(words) < MAX_WORDS:
        words.add(word)
    return word if word in words else OTHER


class ShareCollector(Collector):
    """The intended shares of running experiments' variants, read at each scrape.

    `shares` yields (experiment, variant, share). `label` bounds the set of experiments' names;
    those beyond the bound are left out.
    """

    def __init__(
        self, shares: Callable[[], Iterable[tuple[str, str, float]]], label: Callable[[str], str]
    ) -> None:
        self._shares = shares
        self._label = label

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "quickchange_experiment_share",
            "Share of the units that a running experiment gives to a variant",
            labels=["experiment", "variant"],
        )
        for name, variant, share in self._shares():
            label = self._label(name)
            if label != OTHER:
                family.add_metric([label, variant], share)
        yield family
