"""POST /v1/embeddings over a live server, by the openai library and by hand."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fake_engine import embedding_of
from http_support import BASE, LIMIT_SECONDS, Live, live_server, make_adapter

from quickchange_server.protocol import Component
from quickchange_store.store import Store

BODY = {"model": BASE, "input": "Hello"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("embeddings")
    Store(folder).add("team/sql", make_adapter(1.0))
    with live_server(folder, max_model_len=32) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        yield client


def of_text(text: str, pooling: str, adapters: tuple[Component, ...] = ()) -> np.ndarray[Any, Any]:
    """The fake engine's own, not normalised."""
    return np.array(embedding_of(tuple(text.encode()), pooling, adapters))


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vector / np.sqrt((vector**2).sum())


def test_the_openai_library_gets_unit_vectors(client: openai.OpenAI) -> None:
    # the library asks for base64 by itself and decodes it
    answer = client.embeddings.create(model=BASE, input=["Hello", "World!"])
    assert [item.index for item in answer.data] == [0, 1]
    for item, text in zip(answer.data, ("Hello", "World!"), strict=True):
        np.testing.assert_allclose(item.embedding, unit(of_text(text, "last")), rtol=1e-6)
    assert answer.model == BASE
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 11


def test_floats_by_the_openai_library(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=BASE, input="Hello", encoding_format="float")
    np.testing.assert_allclose(answer.data[0].embedding, unit(of_text("Hello", "last")), rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_and_no_normalisation(live: Live, pooling: str) -> None:
    answer = live.post("/v1/embeddings", {**BODY, "pooling": pooling, "normalize": False}).json()
    assert answer["data"][0]["embedding"] == of_text("Hello", pooling).tolist()


def test_base64_is_little_endian_float32(live: Live) -> None:
    body = {**BODY, "encoding_format": "base64", "normalize": False}
    told = live.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    numbers = np.frombuffer(base64.b64decode(told), dtype="<f4")
    assert numbers.tolist() == of_text("Hello", "last").tolist()


@pytest.mark.parametrize("given", [[72, 101], [[72, 101]]])
def test_token_ids_are_taken_as_they_are(live: Live, given: Any) -> None:
    answer = live.post("/v1/embeddings", {**BODY, "input": given, "normalize": False}).json()
    assert answer["data"][0]["embedding"] == of_text("He", "last").tolist()
    assert len(answer["data"]) == 1


def test_adapters_have_their_own_embeddings(live: Live) -> None:
    digest = live.services.store.resolve("team/sql").digest
    adapters = (Component(digest),)
    answer = live.post("/v1/embeddings", {**BODY, "model": "team/sql", "normalize": False}).json()
    assert answer["data"][0]["embedding"] == of_text("Hello", "last", adapters).tolist()
    assert answer["model"] == "team/sql"


def test_an_input_may_fill_the_context_and_not_exceed_it(live: Live) -> None:
    assert live.post("/v1/embeddings", {**BODY, "input": "x" * 32}).status_code == 200
    refused = live.post("/v1/embeddings", {**BODY, "input": "x" * 33})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"dimensions": 5}, "dimensions"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": None}, "input"),
        ({"pooling": "max"}, "pooling"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"normalize": 1}, "normalize"),
        ({"temperature": 0.5}, "temperature"),
        ({"model": "nobody"}, "model"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [[1]] * 2049}, "input"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(live: Live, change: Any, param: str) -> None:
    refused = live.post("/v1/embeddings", {**BODY, **change})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param


def test_embeddings_are_counted_as_requests_that_ended_well(live: Live) -> None:
    def stopped() -> float:
        lines = live.http.get("/metrics").text.splitlines()
        found = [
            line
            for line in lines
            if line.startswith("quickchange_requests_total{") and '"stop"' in line
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    before = stopped()
    live.post("/v1/embeddings", {**BODY, "input": ["a", "b"]})
    assert stopped() == before + 2


def test_a_variant_that_drafts_answers_with_a_vector_and_drafts_nothing(live: Live) -> None:
    drafting = {"name": "b", "model": "team/sql", "turbo": "lookup"}
    variants = [{"name": "a", "model": BASE, "weight": 0}, drafting]
    made = live.post("/v1/experiments", {"name": "vectors", "variants": variants})
    assert made.status_code == 201, made.text
    response = live.post("/v1/embeddings", {**BODY, "model": "vectors", "normalize": False})
    assert response.json()["quickchange"] == {"experiment": "vectors", "variant": "b"}
    adapters = (Component(live.store.resolve("team/sql").digest),)
    told = response.json()["data"][0]["embedding"]
    assert told == of_text("Hello", "last", adapters).tolist()
    assert 'requests_total{drafter="lookup"} 1' not in live.http.get("/metrics").text


@pytest.mark.parametrize("count", [257, 2048])
def test_more_inputs_than_the_queue_takes_have_their_vectors(live: Live, count: int) -> None:
    texts = [f"text {i % 7}" for i in range(count)]
    body = live.post("/v1/embeddings", {**BODY, "input": texts}).json()
    assert [entry["index"] for entry in body["data"]] == list(range(count))
    alike: dict[str, Any] = {}
    for text, entry in zip(texts, body["data"], strict=True):
        assert alike.setdefault(text, entry["embedding"]) == entry["embedding"]
    assert live.services.client.in_flight == 0
