"""A server under load and a Prometheus beside it, once for the folder.

Makes the server tests' helpers importable by name, in spawned engine processes too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "server"):
    sys.path.insert(0, str(folder))

from fleet_load import fleet, observe, under_load  # noqa: E402
from http_support import Live  # noqa: E402
from prometheus_support import Observed, program, prometheus  # noqa: E402

LOAD_SECONDS = 12.0


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with fleet(tmp_path_factory.mktemp("fleet")) as live:
        from stand_in_metrics import stand_ins

        existing = set(re.findall(r"^# TYPE (\S+) ", live.http.get("/metrics").text, re.MULTILINE))
        with stand_ins(live.services.metrics.registry, existing):
            yield live


@pytest.fixture(scope="session")
def exported(live: Live) -> dict[str, str]:
    """Every metric of /metrics and its type; names as samples have them, histograms' without
    their endings."""
    text = live.http.get("/metrics").text
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


@pytest.fixture(scope="session")
def observed(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    program("prometheus")
    with prometheus(tmp_path_factory.mktemp("prometheus"), urlsplit(live.url).netloc) as running:
        with under_load(live):
            start, end = observe(LOAD_SECONDS)
        yield Observed(running, start, end)
