"""/v1/model-rewrites: an experiment out as a gateway's resource, and in from one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import BASE, Live, live_server, make_adapter

from quickchange_store.store import Store

EXPERIMENT = {
    "name": "tone",
    "variants": [
        {"name": "now", "model": BASE, "weight": 3},
        {"name": "new", "model": "orders", "overrides": {"temperature": 0}},
    ],
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("store")
    Store(folder).add("orders", make_adapter(1.0))
    with live_server(folder) as served:
        assert served.post("/v1/experiments", EXPERIMENT).status_code == 201
        yield served


def test_what_is_exported_can_be_imported_again(live: Live, tmp_path: Path) -> None:
    answer = live.http.get("/v1/model-rewrites/tone?pool=llama").json()
    assert answer["object"] == "experiment.rewrite"
    assert any("'new'" in line for line in answer["left_out"])
    Store(tmp_path).add("orders", make_adapter(1.0))
    with live_server(tmp_path) as other:
        made = other.post("/v1/model-rewrites", answer["rewrite"])
        assert made.status_code == 201, made.text
        (experiment,) = made.json()["data"]
        assert experiment["shares"] == {"now": 0.75, "new": 0.25}
        there = other.http.get("/v1/experiments/tone").json()
        assert there["definition"]["variants"][1]["model"] == "orders"
        assert other.post("/v1/model-rewrites", answer["rewrite"]).status_code == 409


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/model-rewrites/nobody?pool=llama", 404),
        ("/v1/model-rewrites/tone", 400),
        ("/v1/model-rewrites/tone?pool=A%20b", 400),
    ],
)
def test_an_unknown_experiment_or_no_pool_is_refused(live: Live, path: str, status: int) -> None:
    assert live.http.get(path).status_code == status


def test_a_target_that_is_not_there_is_refused_with_its_place(live: Live) -> None:
    rule = {
        "matches": [{"model": {"value": "split"}}],
        "targets": [{"modelRewrite": BASE}, {"modelRewrite": "nobody"}],
    }
    answer = live.post("/v1/model-rewrites", {"spec": {"rules": [rule]}})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "variants[1].model"
