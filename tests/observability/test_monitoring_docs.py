"""docs/monitoring.md lists every metric, dashboard, alert and span attribute that there is."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from clustered_metrics import Clustered
from dashboard_support import NAMES, load
from http_support import Live
from prometheus_client.parser import text_string_to_metric_families
from prometheus_support import Observed, rules

from quickchange_server.frontend.caller import ANYONE
from quickchange_server.frontend.request_observers import Assignment, Completed, Opened
from quickchange_server.observability.tracing import attributes_of
from quickchange_server.protocol import SamplingParams

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"
ROW = re.compile(r"^\| `(quickchange_\w+)` \| (\w+) \| (.*) \| (.+) \|$", re.MULTILINE)
ONLY_IN_CLUSTERS = (
    "quickchange_cluster_replicas",
    "quickchange_cluster_engines_wanted",
    "quickchange_ingress_requests",
    "quickchange_limits_counted_alone_total",
    "quickchange_routing_total",
    "quickchange_stream_resumes_total",
    "quickchange_stream_pause_seconds",
)
OPENED = Opened(
    "cmpl-1",
    ANYONE,
    "m",
    "orders",
    7,
    20,
    1,
    0.0,
    Assignment("e", "a", "u", "hash"),
    sampling=SamplingParams(seed=1),
)


def section(title: str) -> str:
    """A section of the second level."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)
    assert isinstance(found, str)
    return found


def documented() -> dict[str, tuple[str, set[str]]]:
    """Each metric's type and labels."""
    rows = ROW.findall(section("Metrics"))
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def test_every_exported_metric_is_listed_with_its_type_and_no_other(
    exported: dict[str, str],
) -> None:
    assert {name: kind for name, (kind, _) in documented().items()} == exported


def labels_in(text: str) -> defaultdict[str, set[str]]:
    """The labels of each metric."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples:
            seen[name] |= sample.labels.keys() - {"le"}
    return seen


def test_every_metrics_labels_are_listed(live: Live, observed: Observed) -> None:
    assert observed.end > observed.start  # the load has been, so that labels have values
    listed, seen = documented(), labels_in(live.http.get("/metrics").text)
    assert seen
    for name in listed.keys() - set(ONLY_IN_CLUSTERS):
        assert listed[name][1] == seen[name], name


def test_in_a_cluster_every_series_of_a_replica_has_its_label_besides(
    cluster: tuple[Clustered, str], observed: Observed
) -> None:
    assert observed.end > observed.start
    listed, seen = documented(), labels_in(cluster[0].exposition().decode())
    assert {name for name in listed if name not in seen} == set()
    for name, (_, labels) in listed.items():
        own = set() if name.startswith("quickchange_cluster_") else {"replica"}
        assert seen[name] == labels | own, name


def test_every_dashboard_is_listed_by_its_title() -> None:
    titles = re.findall(r"^\| (Quickchange: \w+) \|", section("Dashboards"), re.M)
    assert sorted(titles) == sorted(load(name)["title"] for name in NAMES)


def test_every_alert_has_a_runbook_where_it_points_and_no_runbook_is_left_over() -> None:
    alerts = rules("alerts.yml")
    written = re.findall(r"^### (\w+)$", section("Runbooks"), re.M)
    assert written == [alert["alert"] for alert in alerts]
    for alert in alerts:
        anchor = f"docs/monitoring.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook"] == anchor


def test_every_link_inside_the_page_has_its_heading() -> None:
    text = DOCS.read_text()
    anchors = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


def test_every_panel_that_a_runbook_names_exists() -> None:
    titles = {panel["title"] for name in NAMES for panel in load(name)["panels"]}
    named = {
        "Engine start",
        "Failed requests by adapter",
        "Running and waiting",
        "Batch of a step",
        "Time in the queue",
        "Load time",
        "Share of prompt rows",
        "Acceptance by drafter",
        "Commits",
        "Processes",
    }
    assert named <= titles
    runbooks = " ".join(section("Runbooks").split())
    assert all(name in runbooks for name in named)


def test_every_attribute_of_a_span_is_listed() -> None:
    completed = Completed(OPENED, "stop", first_token_seconds=0.1)
    sent = attributes_of(completed) | attributes_of(replace(completed, ending="failed"))
    rows = re.findall(r"^\| (`.+?) \|", section("Traces"), re.M)
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} == set(sent)
