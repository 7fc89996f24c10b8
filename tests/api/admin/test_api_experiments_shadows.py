"""Shadows: computed in the background, never seen, dropped before they are in the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter, wait_until

A, B = {"name": "a", "model": BASE}, {"name": "b", "model": BASE}
SHADOW = {"name": "s", "model": "sql", "overrides": {"max_tokens": 6}}
BODY = {"model": "tone", "prompt": "Hello", "seed": 1, "max_tokens": 4}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def live(tmp_path: Path, journal: Path) -> Iterator[Live]:
    behaviour = Behaviour(step_seconds=0.002, journal=journal)
    with live_server(tmp_path / "store", behaviour) as live:
        live.store.add("sql", make_adapter(1.0))
        yield live


def create(live: Live, **changes: Any) -> None:
    body = {"name": "tone", "variants": [A, B], "shadows": [SHADOW], **changes}
    response = live.post("/v1/experiments", body)
    assert response.status_code == 201, response.text


def shadowed(live: Live) -> dict[str, Any]:
    shadows: dict[str, Any] = live.http.get("/v1/experiments/tone/results").json()["shadows"]
    return shadows


def counted(live: Live, outcome: str) -> float:
    name = "quickchange_experiment_shadow_requests_total"
    line = f'{name}{{experiment="tone",outcome="{outcome}",variant="s"}} '
    lines = [entry for entry in live.http.get("/metrics").text.splitlines() if line in entry]
    return float(lines[0].removeprefix(line)) if lines else 0.0


def test_a_shadow_is_computed_in_the_background_and_not_shown(live: Live, journal: Path) -> None:
    create(live)
    answer = live.post("/v1/completions", BODY)
    assert answer.headers["x-quickchange-variant"] in ("a", "b")
    plain = live.post("/v1/completions", {**BODY, "model": BASE}).json()
    assert answer.json()["choices"] == plain["choices"]
    wait_until(lambda: "s" in shadowed(live))
    assert shadowed(live)["s"]["tokens"] == {"count": 1, "mean": 6.0}
    assert counted(live, "length") == 1
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    background = {e["request_id"]: e["background"] for e in entries if e["kind"] == "Submit"}
    answered = answer.json()["id"]
    assert background[f"{answered}-0"] is False
    assert background[f"{answered}.0-0"] is True


def test_a_shadow_changes_neither_ratio_nor_measures(live: Live) -> None:
    create(live)
    live.post("/v1/completions", BODY).raise_for_status()
    wait_until(lambda: "s" in shadowed(live))
    results = live.http.get("/v1/experiments/tone/results").json()
    assert sum(results["ratio"]["observed"].values()) == 1
    tokens = next(o for o in results["automatic"] if o["name"] == "tokens")
    assert [v["variant"] for v in tokens["variants"]] == ["a", "b"]
    assert {v["mean"] for v in tokens["variants"]} == {4.0, None}


def test_shadows_beyond_the_limit_are_dropped(live: Live) -> None:
    create(live, shadow_limit=1, shadows=[{**SHADOW, "overrides": {"max_tokens": 200}}])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: live.post("/v1/completions", BODY), range(4)))
    assert counted(live, "dropped") >= 1


def test_a_share_of_zero_has_no_shadow(live: Live) -> None:
    create(live, shadows=[{**SHADOW, "share": 0.0}])
    live.post("/v1/completions", BODY).raise_for_status()
    assert shadowed(live) == {}
    assert counted(live, "dropped") == 0


def test_a_shadow_that_can_not_be_served_costs_no_answer(live: Live) -> None:
    create(live)
    live.http.delete("/v1/adapters/sql").raise_for_status()
    assert live.post("/v1/completions", BODY).status_code == 200


def test_a_paused_experiment_has_no_shadows(live: Live) -> None:
    create(live)
    live.http.post("/v1/experiments/tone/pause").raise_for_status()
    live.post("/v1/completions", BODY).raise_for_status()
    assert live.services.client.in_flight == 0
    assert shadowed(live) == {}


def test_a_drain_does_not_wait_for_shadows(tmp_path: Path) -> None:
    behaviour = Behaviour(step_seconds=0.05)
    with live_server(tmp_path, behaviour, drain_seconds=25) as live:
        wait_until(lambda: live.http.get("/health").status_code == 200)
        live.store.add("sql", make_adapter(1.0))
        create(live, shadows=[{**SHADOW, "overrides": {"max_tokens": 900}}])
        live.post("/v1/completions", {**BODY, "max_tokens": 1}).raise_for_status()
        assert live.services.client.in_flight == 1
        live.end()
        live.thread.join(10)
        assert not live.thread.is_alive()
