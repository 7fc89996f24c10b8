"""A server under load and a Prometheus beside it, once for the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from clustered_metrics import Clustered, clustered
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
def cluster(live: Live) -> Iterator[tuple[Clustered, str]]:
    """The same server as a cluster tells it, and the address of its metrics."""
    with clustered(live.services) as told:
        yield told


@pytest.fixture(scope="session")
def exported(live: Live, cluster: tuple[Clustered, str]) -> dict[str, str]:
    """Every metric of /metrics and its type, those that only a cluster has too; names as samples
    have them, histograms' without their endings."""
    text = live.http.get("/metrics").text + cluster[0].exposition().decode()
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


@pytest.fixture(scope="session")
def observed(
    served: Fleet, cluster: tuple[Clustered, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    program("prometheus")
    instances = {"machine": urlsplit(served.live.url).netloc, "cluster": cluster[1]}
    authorization = served.live.http.headers.get("authorization")
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(folder, tuple(instances.values()), authorization) as running:
        with under_load(served) as rounds:
            start, end = observe(LOAD_SECONDS, rounds)
        running.scrape_no_more()
        yield Observed(running, start, end, instances)
