"""A server under load and a Prometheus beside it, once for the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fleet_load import Fleet, fleet, observe, under_load
from http_support import Live
from prometheus_support import Observed, program, prometheus

LOAD_SECONDS = 12.0


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("fleet")) as served:
        yield served


@pytest.fixture(scope="session")
def live(served: Fleet) -> Live:
    return served.live


@pytest.fixture(scope="session")
def exported(live: Live) -> dict[str, str]:
    """Every metric of /metrics and its type; names as samples have them, histograms' without
    their endings."""
    text = live.http.get("/metrics").text
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


@pytest.fixture(scope="session")
def observed(served: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    program("prometheus")
    target = urlsplit(served.live.url).netloc
    authorization = served.live.http.headers.get("authorization")
    with prometheus(tmp_path_factory.mktemp("prometheus"), target, authorization) as running:
        with under_load(served):
            start, end = observe(LOAD_SECONDS)
        yield Observed(running, start, end)
