"""promtool's word on the configuration, the rules and the alerts' unit tests."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from prometheus_support import FILES, program, rules

ALERTS = rules("alerts.yml")


def promtool(*arguments: str) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["prometheus.yml", "cluster.yml"])
def test_promtool_finds_the_configuration_sound(name: str) -> None:
    promtool("check", "config", str(FILES / name))


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_promtool_finds_the_rules_sound(name: str) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(FILES / name))


def test_the_alerts_unit_tests_pass() -> None:
    promtool("test", "rules", str(FILES / "alerts_test.yml"))


def test_every_alert_is_seen_to_fire_and_to_keep_still() -> None:
    tests = yaml.safe_load((FILES / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case.get("exp_alerts")}
    still = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fired == still == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_why_and_where_to_read_on(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in {"info", "warning", "critical"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert all(alert["annotations"].values())
