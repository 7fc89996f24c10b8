"""Every query of every dashboard and every rule, run by Prometheus over a server under load."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from dashboard_support import NAMES, Query, built_in, filled, load, queries
from prometheus_support import SCRAPE_SECONDS, Observed, rules

RANGE_SECONDS = 30
SILENT = "QuickchangeNoServer"  # its expression has a value only where nothing is scraped
COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) ")
LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")


# Each dashboard with the kinds of server that it shows: series without a replica's label and with.
SHOWN = [
    (name, kind)
    for name in NAMES
    for kind in ("machine", "cluster")
    if (name, kind) != ("cluster", "machine")
]


def values_of(observed: Observed, dashboard: dict[str, Any], kind: str) -> dict[str, str]:
    """The variables as Grafana sets them when the dashboard opens, and this server is chosen."""
    values = built_in(SCRAPE_SECONDS, RANGE_SECONDS)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert found is not None, variable
            selector = filled(found[1], values)
            options = observed.prometheus.label_values(selector, found[2], observed.start)
            assert options, f"{variable['name']} has nothing to choose from"
            values[variable["name"]] = variable.get("allValue", options[0])
            if variable["name"] == "instance":
                assert observed.instances[kind] in options
                values["instance"] = observed.instances[kind]
    return values


def answer(observed: Observed, query: Query, values: dict[str, str]) -> list[float]:
    expression = filled(query.expression, values)
    if query.instant:
        return observed.prometheus.at(expression, observed.end)
    return observed.prometheus.over(expression, observed.start, observed.end)


@pytest.mark.parametrize(("name", "kind"), SHOWN)
def test_every_panels_query_returns_data(observed: Observed, name: str, kind: str) -> None:
    values = values_of(observed, load(name), kind)
    asked = list(queries(name))
    assert asked
    without = [
        str(query)
        for query in asked
        if not any(math.isfinite(value) for value in answer(observed, query, values))
    ]
    assert not without, "\n".join(without)


@pytest.mark.parametrize(("name", "kind"), SHOWN)
def test_every_annotations_query_is_understood(observed: Observed, name: str, kind: str) -> None:
    dashboard = load(name)
    values = values_of(observed, dashboard, kind)
    for annotation in dashboard["annotations"]["list"]:
        observed.prometheus.over(filled(annotation["expr"], values), observed.start, observed.end)


@pytest.mark.parametrize("kind", ["machine", "cluster"])
def test_every_recording_rule_has_recorded(observed: Observed, kind: str) -> None:
    recorded = [rule["record"] for rule in rules("rules.yml")]
    assert recorded
    for name in recorded:
        wanted = "" if name.startswith("variant:") else f'{{instance="{observed.instances[kind]}"}}'
        values = observed.prometheus.over(name + wanted, observed.start, observed.end)
        assert any(math.isfinite(value) for value in values), name


def test_what_is_recorded_of_a_cluster_is_recorded_by_replica(observed: Observed) -> None:
    there = f'{{instance="{observed.instances["cluster"]}"}}'
    for name, replicas in {
        "instance:quickchange_kv_used:ratio": ["engine-busy", "engine-idle"],
        "instance:quickchange_requests:rate5m": ["ingress-own"],
        "instance:quickchange_adapter_loads_per_request:ratio_rate5m": ["engine-busy"],
    }.items():
        told = observed.prometheus.label_values(name + there, "replica", observed.start)
        assert set(told) >= set(replicas), name


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules("alerts.yml")])
def test_every_alert_has_something_to_judge(observed: Observed, alert: str) -> None:
    """A comparison with `bool` keeps what it drops otherwise: series that are as they should be."""
    (expression,) = (rule["expr"] for rule in rules("alerts.yml") if rule["alert"] == alert)
    judged = COMPARISON.sub(r" \1 bool ", expression)
    values = observed.prometheus.over(judged, observed.start, observed.end)
    assert bool(values) == (alert != SILENT)


@pytest.mark.parametrize(
    "series",
    [
        "engine_restarts_total",
        'requests_rejected_total{reason="queue_full"}',
        "requests_resubmitted_total",
        "adapter_evictions_total",
        "adapter_load_failures_total",
        "preemptions_total",
        "late_compilations_total",
        "late_captures_total",
    ],
)
def test_the_load_has_what_is_rare(observed: Observed, series: str) -> None:
    values = observed.prometheus.over(f"quickchange_{series}", observed.start, observed.end)
    assert max(values) > 0


def test_prometheus_evaluates_every_rule_without_an_error(observed: Observed) -> None:
    groups = observed.prometheus.ask("/api/v1/rules")["groups"]
    health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert len(health) == len(rules("rules.yml")) + len(rules("alerts.yml"))
    assert set(health.values()) == {"ok"}
