"""Clients and experiments, unchanged, against a cluster of two ingresses."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from client_environments import run_client
from cluster_harness import LiveCluster, wait_until
from cluster_streams import PROMPT, series
from lorax_client import python_with_client, run_script

from quickchange_server.observability.replica_metrics import RENEW_SECONDS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

TESTS = Path(__file__).parents[2]
SCRIPTS = TESTS / "clients" / "scripts"
USERS = 24
EXPERIMENT = {
    "name": "tone",
    "variants": [{"name": "now", "model": "base"}, {"name": "tuned", "model": "sql"}],
    "metrics": [{"name": "liked", "kind": "flag"}],
}


@pytest.mark.parametrize(
    "script", [pytest.param("client_openai.py", marks=pytest.mark.slow), "client_lorax.py"]
)
def test_a_client_gets_what_it_asks_for(cluster: LiveCluster, script: str, tmp_path: Path) -> None:
    run_client(SCRIPTS / script, tmp_path, URL=cluster.url, MODEL="base", ADAPTER="sql")


def test_lorax_client_reads_answers_streams_and_refusals(cluster: LiveCluster) -> None:
    cases = ("adapter", "stream", "async stream", "linear", "ties", "best of", "unknown adapter")
    script = TESTS / "support" / "lorax_script.py"
    found = run_script(python_with_client(), script, cluster.url, *cases)
    text = found["adapter"]["answer"]["generated_text"]
    for case in ("stream", "async stream"):
        assert found[case]["answer"][-1]["generated_text"] == text
    for case in ("linear", "ties"):
        assert found[case]["answer"]["details"]["generated_tokens"] == 6
    assert len(found["best of"]["answer"]["details"]["best_of_sequences"]) == 2
    assert found["unknown adapter"]["raised"] == "GenerationError"


def test_an_experiments_variants_stick_and_its_outcomes_count_over_both_ingresses(
    cluster: LiveCluster,
) -> None:
    post(cluster, "/v1/experiments", EXPERIMENT)
    wait_until(lambda: all(known(cluster) for _ in range(8)))  # the other one reads it, too
    time.sleep(RENEW_SECONDS + 2)  # until what was asked before is counted
    before = ingresses(cluster)
    variants: dict[str, str] = {}
    for turn in range(3):
        for number in range(USERS):
            user = f"user-{number}"
            body = {"model": "tone", "user": user, "prompt": PROMPT, "max_tokens": 2}
            answer = post(cluster, "/v1/completions", body)
            variant = answer["quickchange"]["variant"]
            assert variants.setdefault(user, variant) == variant
            if turn == 0:
                told = {"name": "liked", "value": True, "completion": answer["id"]}
                post(cluster, "/v1/experiments/tone/outcomes", told)
    wait_until(lambda: sum(ingresses(cluster).values()) >= sum(before.values()) + 3 * USERS)
    after = ingresses(cluster)
    assert sum(after[name] > before.get(name, 0) for name in after) == 2
    assert len(set(variants.values())) == 2
    by_variant = Counter(variants.values())

    def counted() -> bool:
        results = cluster.http.get("/v1/experiments/tone/results").raise_for_status().json()
        (liked,) = results["outcomes"]
        return {v["variant"]: v["count"] for v in liked["variants"]} == by_variant

    wait_until(counted)
    post(cluster, "/v1/experiments/tone/stop", {})


def post(cluster: LiveCluster, route: str, body: dict[str, Any]) -> Any:
    answer = cluster.http.post(route, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def known(cluster: LiveCluster) -> bool:
    body = {"model": "tone", "user": "first", "prompt": PROMPT, "max_tokens": 1}
    return cluster.http.post("/v1/completions", json=body).status_code == 200


def ingresses(cluster: LiveCluster) -> dict[str, float]:
    found = series(cluster.http, "quickchange_http_responses_total", route="/v1/completions")
    return {replica: count for replica, count in found.items() if replica.startswith("ingress")}
