"""The dashboards' files, and what Grafana makes of their queries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docker" / "grafana"
NAMES = ("adapters", "cluster", "experiments", "fleet", "tenants", "turbo")
METRIC = re.compile(r"\b(?:[a-z]+:)?quickchange_[a-z0-9_]+(?::[a-z0-9_]+)?")
VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


def load(name: str) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((FOLDER / "dashboards" / f"{name}.json").read_text())
    return dashboard


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    dashboard: str
    panel: str
    expression: str
    instant: bool

    @property
    def metrics(self) -> set[str]:
        return set(METRIC.findall(self.expression))

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.expression}"


def queries(name: str) -> Iterator[Query]:
    for panel in load(name)["panels"]:
        for target in panel.get("targets", ()):
            yield Query(name, panel["title"], target["expr"], target.get("instant", False))


def filled(expression: str, values: Mapping[str, str]) -> str:
    """An expression with its variables replaced. Raises KeyError for one without a value."""
    return VARIABLE.sub(lambda match: values[match[1] or match[2]], expression)


def built_in(scrape_seconds: int, range_seconds: int) -> dict[str, str]:
    """Grafana's own variables for a panel with a point for each scrape."""
    interval = scrape_seconds
    return {
        "__interval": f"{interval}s",
        "__rate_interval": f"{max(interval + scrape_seconds, 4 * scrape_seconds)}s",
        "__range": f"{range_seconds}s",
    }
