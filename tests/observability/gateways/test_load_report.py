"""The load in an answer's header, as balancers read ORCA's reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_support import READY, FakeCluster, Replica
from http_support import Live, live_server

from quickchange_server.config import Settings
from quickchange_server.observability.gateways.load_report import FORMAT, REPORT, load_report
from quickchange_server.observability.gateways.vllm_metrics import EngineLoad
from quickchange_server.observability.metrics import Metrics

LOAD = EngineLoad(running=3, waiting=2, kv_blocks=100, kv_share=0.25)
NAMED = {"kv_cache_usage_perc": 0.25, "num_requests_running": 3.0, "num_requests_waiting": 2.0}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.mark.parametrize("form", ["JSON", "json", " Json "])
def test_json_holds_the_named_metrics(form: str) -> None:
    kind, _, rest = str(load_report(form, LOAD)).partition(" ")
    assert (kind, json.loads(rest)) == ("JSON", {"named_metrics": NAMED})


def test_text_is_a_list_of_names_and_values() -> None:
    kind, _, rest = str(load_report("text", LOAD)).partition(" ")
    pairs = (item.split("=") for item in rest.split(", "))
    found = {name.removeprefix("named_metrics."): float(value) for name, value in pairs}
    assert (kind, found) == ("TEXT", NAMED)


@pytest.mark.parametrize("form", ["", "BIN", "xml", "JSON,TEXT"])
def test_another_format_is_told_nothing(form: str) -> None:
    assert load_report(form, LOAD) is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}),
    ],
)
def test_answers_carry_it_if_it_is_asked_for(live: Live, path: str, body: object) -> None:
    asked = live.http.post(path, json=body, headers={FORMAT: "JSON"})
    assert asked.status_code == 200, asked.text
    told = json.loads(asked.headers[REPORT].removeprefix("JSON "))
    assert told["named_metrics"].keys() == NAMED.keys()
    assert REPORT not in live.http.post(path, json=body).headers


def test_an_ingress_tells_the_load_of_all_replicas() -> None:
    cluster = FakeCluster(Replica("engine-1"), Replica("engine-2"))
    load = Metrics(Settings(model="fake", store=Path("store"))).load(cluster.seen)
    assert (load.running, load.kv_blocks) == (16, 2 * READY.kv_blocks)
