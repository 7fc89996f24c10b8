"""Whoever changes experiments without end can't grow the number of series without end."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from quickchange_server.frontend.request_observers import Assignment
from quickchange_server.observability.experiment_metrics import MAX_WORDS, ExperimentMetrics


def series(registry: CollectorRegistry) -> list[dict[str, str]]:
    samples = [s for family in registry.collect() for s in family.samples]
    return [s.labels for s in samples if s.name.endswith("_total")]


def test_variants_and_outcomes_of_a_name_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = ExperimentMetrics(registry, limit=1)
    for number in range(2 * MAX_WORDS):
        metrics.outcome("orders", "now", f"metric-{number}")
        metrics.shadow_dropped(Assignment("orders", f"variant-{number}", None, "random"))
    found = series(registry)
    assert len(found) <= 2 * (MAX_WORDS + 1)
    assert {"experiment": "orders", "variant": "now", "name": "metric-0"} in found
    assert {"experiment": "orders", "variant": "now", "name": "other"} in found


def test_experiments_beyond_the_bound_share_one_series() -> None:
    registry = CollectorRegistry()
    metrics = ExperimentMetrics(registry, limit=1)
    metrics.outcome("orders", "now", "liked")
    for number in range(20):
        metrics.outcome(f"more-{number}", f"variant-{number}", f"metric-{number}")
    others = [labels for labels in series(registry) if labels["experiment"] == "other"]
    assert others == [{"experiment": "other", "variant": "other", "name": "other"}]
