"""Completions and streams of a cluster: texts of a single server, whatever becomes of engines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cluster_harness import LiveCluster, wait_until
from llm_models import LlmModels

from quickchange_server.entrypoints.llm import LLM
from quickchange_server.protocol import SamplingParams

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's: sockets, log files, deprecations
]

PROMPT = "select all of it"
ADAPTERS = (None, "sql", "orders")


@pytest.fixture(scope="module")
def single(models: LlmModels) -> Iterator[LLM]:
    """One engine without a cluster, over the same base and adapters."""
    adapters = {name: str(path) for name, path in models.adapters.items()}
    with LLM(model=str(models.path), adapters=adapters, threads=1, dtype="float32") as llm:
        yield llm


def texts_of(single: LLM, asked: list[tuple[str | None, int]], tokens: int) -> list[str]:
    """What an undisturbed engine writes for each adapter and seed."""
    return [
        single.generate(
            PROMPT,
            SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8, seed=seed),
            adapter=adapter,
        )[0]
        .outputs[0]
        .text
        for adapter, seed in asked
    ]


def body_of(adapter: str | None, seed: int, tokens: int) -> dict[str, Any]:
    return {
        "model": adapter or "base",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
    }


def streamed(cluster: LiveCluster, body: dict[str, Any]) -> tuple[str, float]:
    """The text of a stream, and the longest pause within it."""
    text, pause, last = "", 0.0, time.monotonic()
    with cluster.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            now = time.monotonic()
            pause, last = max(pause, now - last), now
    return text, pause


def test_completions_and_streams_have_the_text_of_a_single_server(
    cluster: LiveCluster, single: LLM
) -> None:
    asked = [(adapter, seed) for adapter in ADAPTERS for seed in (1, 2)]
    expected = texts_of(single, asked, 24)
    for (adapter, seed), text in zip(asked, expected, strict=True):
        body = body_of(adapter, seed, 24)
        answer = cluster.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text
        assert streamed(cluster, body)[0] == text


def test_kill_9_of_an_engine_replica_is_a_pause_of_its_streams(
    cluster: LiveCluster, single: LLM
) -> None:
    cluster.wait_for("Engine", 2)
    asked = [(ADAPTERS[n % 3], n) for n in range(8)]
    expected = texts_of(single, asked, 300)
    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(streamed, cluster, body_of(*one, 300)) for one in asked]
        wait_until(lambda: running(cluster) == len(asked))
        cluster.kill("Engine")
        outcomes = [stream.result() for stream in streams]
    print("longest pause:", max(pause for _, pause in outcomes))
    assert [text for text, _ in outcomes] == expected
    cluster.wait_for("Engine", 2)


def running(cluster: LiveCluster) -> int:
    """Requests that the ingress has in flight."""
    for line in cluster.http.get("/metrics").text.splitlines():
        if line.startswith("quickchange_ingress_requests{"):
            return int(float(line.split()[-1]))
    return 0
