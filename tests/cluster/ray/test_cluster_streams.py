"""Every kind of request through a cluster, with the answer of a single server."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cluster_harness import LiveCluster, wait_until
from cluster_streams import PROMPT, Asked, Stream, expected, series

from quickchange_server.entrypoints.llm import LLM
from quickchange_server.observability.replica_metrics import RENEW_SECONDS
from quickchange_server.protocol import SamplingParams

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]


def answer(cluster: LiveCluster, route: str, **body: Any) -> Any:
    response = cluster.http.post(route, json={"model": "sql", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_completions_and_streams_have_the_text_of_a_single_server(
    cluster: LiveCluster, single: LLM
) -> None:
    asked = [Asked(adapter, seed, 24) for adapter in (None, "sql", "orders") for seed in (1, 2)]
    for one, said in zip(asked, expected(single, asked), strict=True):
        whole = answer(cluster, "/v1/completions", **one.body)
        assert whole["choices"][0]["text"] == said.text
        assert whole["usage"]["completion_tokens"] == said.counted
        assert Stream(one).read(cluster.http).said == said


def test_embeddings_are_a_single_servers(cluster: LiveCluster, single: LLM) -> None:
    found = answer(cluster, "/v1/embeddings", input=[PROMPT, "another"])["data"]
    right = single.embed([PROMPT, "another"], adapter="sql")
    for given, output in zip(found, right, strict=True):
        assert given["embedding"] == pytest.approx(output.outputs.embedding, abs=1e-5)


def test_log_probabilities_of_the_prompt_are_a_single_servers(
    cluster: LiveCluster, single: LLM
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    found = answer(cluster, "/v1/completions", **body)["choices"][0]["prompt_logprobs"]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    (right,) = single.generate(PROMPT, sampling, adapter="sql")
    assert right.prompt_logprobs is not None
    assert len(found) == len(PROMPT)
    assert found[0] is None
    for given, position in zip(found[1:], right.prompt_logprobs[1:], strict=True):
        assert position is not None
        assert {int(token) for token in given} == set(position)
        for token, logprob in position.items():
            assert given[str(token)]["logprob"] == pytest.approx(logprob.logprob, abs=1e-4)


def test_several_choices_are_those_of_a_single_server(cluster: LiveCluster, single: LLM) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    choices = answer(cluster, "/v1/completions", n=4, **body)["choices"]
    sampling = SamplingParams(max_tokens=40, temperature=0.8, seed=5, ignore_eos=True, n=4)
    (right,) = single.generate(PROMPT, sampling, adapter="sql")
    texts = {choice["index"]: choice["text"] for choice in choices}
    assert texts == {output.index: output.text for output in right.outputs}
    assert len(set(texts.values())) == 4


def test_structured_output_is_valid(cluster: LiveCluster) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "gift": {"type": "boolean"}},
        "required": ["size", "gift"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    given = answer(
        cluster,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": PROMPT}],
        response_format=form,
        max_tokens=200,
        seed=3,
    )["choices"][0]
    order = json.loads(given["message"]["content"])
    assert order["size"] in ("small", "large")
    assert isinstance(order["gift"], bool)


def test_a_client_that_goes_away_ends_its_sequence_on_the_engine(cluster: LiveCluster) -> None:
    at_work(cluster, 0)
    before, tokens = steps(cluster), 3500
    body = Asked("sql", 1, tokens).body
    with cluster.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as given:
        lines = given.iter_lines()  # held, or its end would close the stream at once
        next(lines)
        at_work(cluster, 1)
    at_work(cluster, 0)
    assert steps(cluster) - before < tokens


def test_a_full_cluster_refuses_with_429_and_goes_on(cluster: LiveCluster) -> None:
    """Each of two ingresses admits max_queue sequences."""
    room = cluster.settings.max_queue * len(cluster.replicas("Ingress"))
    each = 100
    body = {**Asked("sql", 1, 150).body, "n": each, "logprobs": None}
    requests = room // each + 2
    with ThreadPoolExecutor(requests) as pool:
        given = list(
            pool.map(lambda _: cluster.http.post("/v1/completions", json=body), range(requests))
        )
    statuses = [response.status_code for response in given]
    assert set(statuses) == {200, 429}, statuses
    for response in given:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
    answer(cluster, "/v1/completions", prompt=PROMPT, max_tokens=2)


def at_work(cluster: LiveCluster, count: int) -> None:
    """Wait until the engines say that they run so many sequences."""

    def told() -> bool:
        replicas = cluster.http.get("/v1/cluster").json()["data"]
        return count == sum(r["engine"]["running"] for r in replicas if r["kind"] == "engine")

    wait_until(told)


def steps(cluster: LiveCluster) -> float:
    """Steps of all engines, as they tell them now."""
    time.sleep(RENEW_SECONDS + 2)  # until each has told them and this ingress has heard it
    counts = series(cluster.http, "quickchange_step_duration_seconds_count")
    return sum(count for replica, count in counts.items() if replica.startswith("engine"))
