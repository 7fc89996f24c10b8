"""The dashboards' files: what Grafana needs of them, and that they name what the server exports."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard_support import FOLDER, METRIC, NAMES, VARIABLE, built_in, load, queries
from prometheus_support import FILES, rules

ENDINGS = ("_bucket", "_sum", "_count")
WIDTH = 24  # columns of a dashboard
# What the server exports and no panel shows; why.
UNSHOWN = {
    "quickchange_adapter_info": "joins digests to other series' names",
    "quickchange_api_process_virtual_memory_bytes": "resident memory says more",
    "quickchange_engine_process_virtual_memory_bytes": "resident memory says more",
}


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load(name)["panels"]
    return found


def of_rules() -> dict[str, set[str]]:
    """The metrics in each rule, by the rule's name."""
    files = ("rules.yml", "alerts.yml")
    found = [rule for name in files for rule in rules(name)]
    return {r.get("record") or r["alert"]: set(METRIC.findall(r["expr"])) for r in found}


def family(metric: str, exported: dict[str, str]) -> str:
    """A sample's family: a histogram's samples have endings of their own."""
    for ending in ENDINGS:
        stem = metric.removesuffix(ending)
        if stem != metric and exported.get(stem) == "histogram":
            return stem
    return metric


def test_the_six_dashboards_are_there_and_no_other() -> None:
    files = {path.stem for path in (FOLDER / "dashboards").glob("*")}
    assert files == set(NAMES)


def test_uids_and_titles_are_unique() -> None:
    dashboards = [load(name) for name in NAMES]
    for key in ("uid", "title"):
        values = [dashboard[key] for dashboard in dashboards]
        assert len(set(values)) == len(values)
    assert all(len(dashboard["uid"]) <= 40 for dashboard in dashboards)  # Grafana's bound


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_has_what_grafana_reads(name: str) -> None:
    dashboard = load(name)
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["description"]
    assert dashboard["refresh"]
    assert "id" not in dashboard  # a provisioned dashboard's is the database's own
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables[:2] == ["datasource", "instance"]
    assert len(set(variables)) == len(variables)


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_ids_of_their_own_a_title_a_description_and_a_unit(name: str) -> None:
    ids = [panel["id"] for panel in panels(name)]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels(name)]
    assert all(titles)
    for panel in panels(name):
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert references
            assert len(set(references)) == len(references)


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_in_the_grid_and_on_no_other(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels(name):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= WIDTH, panel["title"]
        columns, lines = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        for cell in itertools.product(columns, lines):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_queries_use_known_variables_and_every_variable_is_used(name: str) -> None:
    dashboard = load(name)
    own = {v["name"] for v in dashboard["templating"]["list"]}
    for query in queries(name):
        used = {match[1] or match[2] for match in VARIABLE.finditer(query.expression)}
        assert used <= own | set(built_in(1, 1)), str(query)
    text = json.dumps(dashboard)
    for variable in own:
        assert f"${variable}" in text or f"${{{variable}}}" in text, variable


def test_every_metric_that_a_panel_or_a_rule_names_is_exported(exported: dict[str, str]) -> None:
    recorded = {rule["record"] for rule in rules("rules.yml")}
    named = {str(query): query.metrics for name in NAMES for query in queries(name)}
    unknown = {
        place: missing
        for place, metrics in {**named, **of_rules()}.items()
        if (missing := {m for m in metrics - recorded if family(m, exported) not in exported})
    }
    assert not unknown


def test_every_metric_that_is_exported_is_on_a_panel(exported: dict[str, str]) -> None:
    expressions = of_rules()
    shown = {metric for name in NAMES for query in queries(name) for metric in query.metrics}
    shown |= {m for recorded in shown & expressions.keys() for m in expressions[recorded]}
    shown |= {m for recorded in shown & expressions.keys() for m in expressions[recorded]}
    families = {family(metric, exported) for metric in shown}
    assert exported.keys() - families == UNSHOWN.keys()


def test_every_recorded_metric_is_used() -> None:
    used = {metric for name in NAMES for query in queries(name) for metric in query.metrics}
    used |= {metric for metrics in of_rules().values() for metric in metrics}
    assert {rule["record"] for rule in rules("rules.yml")} <= used


def test_the_provisioning_points_at_the_dashboards_and_at_prometheus() -> None:
    folder = FOLDER / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    scraped = yaml.safe_load((FILES / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraped
    dashboards = yaml.safe_load((folder / "dashboards" / "quickchange.yaml").read_text())
    (provider,) = dashboards["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).name == "dashboards"
