"""The routes /pooling, /classify, /score and /rerank, and vLLM's fields of /v1/embeddings."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from classifier_models import classifier
from fake_engine import embedding_of
from http_support import BASE, Live, live_server, make_adapter
from text_support import byte_text
from tool_templates import MARKED

from quickchange_server.protocol import Component
from quickchange_store.store import Store

TEXT = {"model": BASE, "input": "Hello"}
ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("pooling")
    store = Store(folder)
    store.add("sql", make_adapter(1.0))
    store.add("kinds", classifier(make_adapter(2.0), 3))
    store.add("fit", classifier(make_adapter(3.0), 1, "sigmoid"))
    store.add("loud", classifier(make_adapter(4.0), 2, "identity"))
    store.alias("live", "kinds")
    with live_server(folder, text=byte_text(MARKED), max_model_len=64) as live:
        yield live


def state(live: Live, text: str, name: str | None = None) -> np.ndarray:
    """The fake engine's own."""
    digests = () if name is None else (Component(live.store.resolve(name).digest),)
    return np.array(embedding_of(tuple(text.encode()), "last", digests), np.float32)


def answer(live: Live, path: str, body: dict[str, Any]) -> Any:
    response = live.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def error(live: Live, path: str, body: dict[str, Any], status: int = 400) -> Any:
    response = live.post(path, body)
    assert response.status_code == status, response.text
    return response.json()["error"]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


# --- SageMaker's route for all bodies -------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"model": "kinds", "input": ["Hello", "you"]}),
        ("/classify", {"model": "live", "messages": ASK}),
        ("/classify", {"model": "kinds", "input": "Hello", "use_activation": False}),
        ("/pooling", {"model": "sql", "task": "embed", "input": "Hello"}),
        ("/pooling", {"model": "kinds", "task": "classify", "messages": ASK}),
        ("/pooling", {"task": "embed", "input": "Hello"}),
    ],
)
def test_an_invocation_is_answered_by_the_route_of_its_task(
    live: Live, path: str, body: dict[str, Any]
) -> None:
    own, invoked = answer(live, path, body), answer(live, "/invocations", body)
    assert own.pop("id") != invoked.pop("id")
    own.pop("created"), invoked.pop("created")
    assert invoked == own


def test_the_adapters_header_makes_an_invocation_classify(live: Live) -> None:
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "kinds"}
    told = live.http.post("/invocations", json={"input": "Hello"}, headers=header).json()
    assert told["data"] == answer(live, "/classify", {"model": "kinds", "input": "Hello"})["data"]


PAIR = {"model": BASE, "queries": "Hi", "documents": ["Hello"]}
RANKED = {"model": BASE, "query": "Hi", "documents": ["Hello"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", TEXT),
        ("/pooling", TEXT),
        ("/classify", {**TEXT, "model": "kinds"}),
        ("/score", PAIR),
        ("/rerank", RANKED),
    ],
)
def test_lengths_that_load_generators_ask_of_every_route_change_nothing(
    live: Live, path: str, body: dict[str, Any]
) -> None:
    plain = answer(live, path, body)
    asked = answer(live, path, {**body, "ignore_eos": True, "min_tokens": 12})
    told = {"data", "results"} & plain.keys()
    assert {name: asked[name] for name in told} == {name: plain[name] for name in told} != {}
    assert error(live, path, {**body, "max_tokens": 12})["param"] == "max_tokens"


# --- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_a_vector_of_fewer_dimensions_is_the_beginning_scaled_to_one(
    live: Live, dimensions: int
) -> None:
    for path, field in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        (found,) = answer(live, path, {**TEXT, "dimensions": dimensions})["data"]
        np.testing.assert_allclose(found[field], unit(state(live, "Hello")[:dimensions]), rtol=1e-6)
    raw = answer(live, "/v1/embeddings", {**TEXT, "dimensions": dimensions, "normalize": False})
    assert raw["data"][0]["embedding"] == state(live, "Hello")[:dimensions].tolist()


@pytest.mark.parametrize("dimensions", [0, -1, 5, 2**70, True, "2"])
def test_dimensions_that_the_vectors_lack_are_refused_by_name(live: Live, dimensions: Any) -> None:
    found = error(live, "/v1/embeddings", {**TEXT, "dimensions": dimensions})
    assert found["param"] == "dimensions"


@pytest.mark.parametrize("name", ["use_activation", "normalize"])
def test_the_length_of_vectors_has_two_names(live: Live, name: str) -> None:
    plain = state(live, "Hello")
    for value, expected in ((True, unit(plain)), (None, unit(plain)), (False, plain)):
        (found,) = answer(live, "/v1/embeddings", {**TEXT, name: value})["data"]
        np.testing.assert_allclose(found["embedding"], expected, rtol=1e-6)
    both = {**TEXT, "use_activation": True, "normalize": False}
    assert error(live, "/v1/embeddings", both)["param"] == "use_activation"


def test_base64_has_the_dtype_and_the_order_of_bytes_that_are_asked_for(live: Live) -> None:
    body = {**TEXT, "encoding_format": "base64", "use_activation": False, "embed_dtype": "float16"}
    for order, mark in (("big", ">"), ("little", "<"), ("native", "<")):
        (found,) = answer(live, "/v1/embeddings", {**body, "endianness": order})["data"]
        numbers = np.frombuffer(base64.b64decode(found["embedding"]), f"{mark}f2")
        assert numbers.tolist() == state(live, "Hello").tolist()


@pytest.mark.parametrize("encoding", ["bytes", "bytes_only"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
def test_bytes_are_all_vectors_one_after_another(live: Live, path: str, encoding: str) -> None:
    body = {"model": BASE, "input": ["a", "b"], "encoding_format": encoding, "dimensions": 3}
    response = live.post(path, {**body, "use_activation": False})
    assert response.headers["content-type"] == "application/octet-stream"
    expected = [state(live, text)[:3] for text in "ab"]
    assert response.content == np.concatenate(expected).tobytes()
    if encoding == "bytes_only":
        assert "metadata" not in response.headers
        return
    told = json.loads(response.headers["metadata"])
    assert told["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert told["model"] == BASE
    common = {"embed_dtype": "float32", "endianness": "native", "shape": [3]}
    assert told["data"] == [
        {"index": 0, "start": 0, "end": 12, **common},
        {"index": 1, "start": 12, "end": 24, **common},
    ]


def test_bytes_of_more_vectors_than_a_header_tells_are_refused(live: Live) -> None:
    body = {"model": BASE, "input": ["x"] * 101}
    found = error(live, "/v1/embeddings", {**body, "encoding_format": "bytes"})
    assert found["param"] == "encoding_format"
    whole = live.post("/v1/embeddings", {**body, "encoding_format": "bytes_only"})
    assert len(whole.content) == 101 * 16


def test_a_chat_is_embedded_as_its_template_renders_it(live: Live) -> None:
    chat = {"model": BASE, "messages": ASK, "use_activation": False}
    rendered = live.post("/tokenize", {"messages": ASK, "add_generation_prompt": False}).json()
    (found,) = answer(live, "/v1/embeddings", chat)["data"]
    by_ids = answer(live, "/v1/embeddings", {**TEXT, "input": rendered["tokens"]})
    np.testing.assert_allclose(unit(np.array(found["embedding"])), by_ids["data"][0]["embedding"])
    for wrong in ({"messages": ASK, "input": "x"}, {}):
        assert error(live, "/v1/embeddings", {"model": BASE, **wrong})["param"] == "input"
    alone = {**TEXT, "add_generation_prompt": True}
    assert error(live, "/v1/embeddings", alone)["param"] == "add_generation_prompt"


@pytest.mark.parametrize("field", ["add_generation_prompt", "continue_final_message"])
def test_a_chat_may_end_as_for_an_answer(live: Live, field: str) -> None:
    chat = {"messages": [*ASK, {"role": "assistant", "content": "Hello"}], field: True}
    plain = {"add_generation_prompt": False} if field == "continue_final_message" else {}
    rendered = live.post("/tokenize", {**chat, **plain}).json()["tokens"]
    found = answer(live, "/classify", {"model": "kinds", **chat})
    assert found["usage"]["prompt_tokens"] == len(rendered)
    by_ids = answer(live, "/classify", {"model": "kinds", "input": rendered})
    assert found["data"] == by_ids["data"]
    both = {**chat, "add_generation_prompt": True, "continue_final_message": True}
    told = error(live, "/classify", {"model": "kinds", **both})["message"]
    assert "Cannot set both `continue_final_message` and `add_generation_prompt` to True" in told


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
@pytest.mark.parametrize("given", ["abcdefgh", [*b"abcdefgh"]])
def test_a_prompt_is_cut_on_the_side_that_is_asked_for(live: Live, path: str, given: Any) -> None:
    field = "data" if path == "/pooling" else "embedding"
    body = {"model": BASE, "input": given, "truncate_prompt_tokens": 3, "use_activation": False}
    for side, kept in ((None, "abc"), ("right", "abc"), ("left", "fgh")):
        found = answer(live, path, {**body, "truncation_side": side})
        assert found["data"][0][field] == state(live, kept).tolist()
        assert found["usage"]["prompt_tokens"] == 3


def test_minus_one_cuts_to_the_context(live: Live) -> None:
    body = {"model": BASE, "input": "x" * 200, "truncate_prompt_tokens": -1}
    assert answer(live, "/v1/embeddings", body)["usage"]["prompt_tokens"] == 64
    for wrong in (0, -2, 65):
        found = error(live, "/v1/embeddings", {**body, "truncate_prompt_tokens": wrong})
        assert found["param"] == "truncate_prompt_tokens"


def test_the_model_may_be_left_out_and_the_clients_id_comes_back(live: Live) -> None:
    for path, kind in (("/v1/embeddings", "embd"), ("/pooling", "pooling")):
        found = answer(live, path, {"input": "x", "request_id": "mine"})
        assert found["model"] == BASE
        assert found["id"] == f"{kind}-mine"
        assert answer(live, path, {"input": "x"})["id"].startswith(f"{kind}-")


# --- classes ------------------------------------------------------------------------------------


def probabilities(live: Live, text: str, name: str) -> np.ndarray:
    head = live.store.classifier(live.store.resolve(name).digest)
    assert head is not None
    return head.probabilities(head.scores(state(live, text, name)[None]))[0]


@pytest.mark.parametrize("name", ["kinds", "live", "kinds@1"])
def test_classes_come_in_vllms_shape(live: Live, name: str) -> None:
    found = answer(live, "/classify", {"model": name, "input": ["a", "bb"]})
    assert found["object"] == "list"
    assert found["model"] == name
    assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert found["id"].startswith("classify-")
    for index, (item, text) in enumerate(zip(found["data"], ("a", "bb"), strict=True)):
        expected = probabilities(live, text, "kinds")
        np.testing.assert_allclose(item["probs"], expected, rtol=1e-6)
        assert item["label"] == f"class {expected.argmax()}"
        assert (item["index"], item["num_classes"]) == (index, 3)


def test_a_regression_tells_its_scores(live: Live) -> None:
    (found,) = answer(live, "/classify", {"model": "loud", "input": "abc"})["data"]
    np.testing.assert_allclose(found["probs"], probabilities(live, "abc", "loud"), rtol=1e-6)


@pytest.mark.parametrize("name", [BASE, "sql"])
@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_what_has_no_head_classifies_nothing(live: Live, name: str, path: str) -> None:
    task = {"task": "classify"} if path == "/pooling" else {}
    found = error(live, path, {"model": name, "input": "x", **task})
    assert found["param"] == "model"
    assert "SEQ_CLS" in found["message"]


@pytest.mark.parametrize(
    "adapters",
    [
        [{"id": "kinds", "weight": 0.5}],
        [{"id": "kinds"}, {"id": "sql"}],
        [{"id": "kinds"}, {"id": "fit"}],
    ],
)
def test_a_head_is_not_read_under_a_mix(live: Live, adapters: Any) -> None:
    body = {"model": BASE, "input": "x", "adapters": adapters}
    assert error(live, "/classify", body)["param"] == "adapters"


def test_a_composition_of_a_classifier_alone_is_that_classifier(live: Live) -> None:
    body = {"model": BASE, "input": "x", "adapters": [{"id": "kinds"}]}
    (found,) = answer(live, "/classify", body)["data"]
    np.testing.assert_allclose(found["probs"], probabilities(live, "x", "kinds"), rtol=1e-6)
    without = {**body, "adapters": [{"id": "kinds", "weight": 0}]}
    assert error(live, "/classify", without)["param"] == "model"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": ASK}),
    ],
)
def test_a_classifier_generates_nothing(live: Live, path: str, body: dict[str, Any]) -> None:
    for named in ({"model": "kinds"}, {"model": BASE, "adapters": [{"id": "live"}]}):
        found = error(live, path, {**named, **body})
        assert found["param"] == "model"
        assert "/classify" in found["message"]
    given = {"inputs": "x", "parameters": {"adapter_id": "kinds"}}
    refused = live.post("/generate", given)
    assert refused.status_code == 422
    assert "/classify" in refused.json()["error"]


def test_the_states_of_a_classifier_are_embedded(live: Live) -> None:
    body = {"model": "kinds", "input": "x", "use_activation": False}
    (found,) = answer(live, "/v1/embeddings", body)["data"]
    assert found["embedding"] == state(live, "x", "kinds").tolist()


def test_classifiers_are_told_from_others(live: Live) -> None:
    cards = {card["id"]: card["quickchange"] for card in live.http.get("/v1/models").json()["data"]}
    assert [cards[name].get("classifier") for name in ("kinds", "live", "sql", BASE)] == [
        *(True, True),
        *(None, None),
    ]
    info = live.http.get("/v1/adapters/kinds").json()["info"]
    assert info["kind"] == "LoRA classifier"
    assert info["classifier"]["labels"] == ["class 0", "class 1", "class 2"]
    assert live.http.get("/v1/adapters/sql").json()["info"]["classifier"] is None


def test_loraxs_form_of_classify_is_refused_in_loraxs_form(live: Live) -> None:
    for path, inputs in (("/classify", "x"), ("/classify_batch", ["x"])):
        refused = live.post(path, {"inputs": inputs})
        assert refused.status_code == 422
        assert refused.json()["error_type"] == "validation"
        assert "token classification" in refused.json()["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"task": "token_embed"}, "task"),
        ({"task": "token_classify"}, "task"),
        ({"task": "plugin"}, "task"),
        ({"task": "score"}, "task"),
        ({"task": "classify", "model": "kinds", "dimensions": 2}, "dimensions"),
        ({"task": "classify", "model": "kinds", "pooling": "mean"}, "pooling"),
        ({"model": "kinds", "normalize": False}, "normalize"),
        ({"padding": "max_length"}, "padding"),
        ({"padding": "longest"}, "padding"),
        ({"priority": 1}, "priority"),
        ({"embed_dtype": "int4"}, "embed_dtype"),
        ({"endianness": "middle"}, "endianness"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"late_chunking_params": {"chunk_size": 2}}, "late_chunking_params"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_what_pooling_does_not_do_is_refused_by_name(
    live: Live, change: dict[str, Any], param: str
) -> None:
    assert error(live, "/pooling", {**TEXT, **change})["param"] == param


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify"])
def test_vllms_defaults_are_accepted(live: Live, path: str) -> None:
    defaults = {
        "add_special_tokens": True,
        "priority": 0,
        "padding": "do_not_pad",
        "cache_salt": None,
        "mm_processor_kwargs": None,
        "truncate_prompt_tokens": None,
        "truncation_side": None,
        "use_activation": None,
        "user": "someone",
    }
    name = "kinds" if path == "/classify" else BASE
    assert answer(live, path, {"model": name, "input": "x", **defaults})["data"]


# --- scores -------------------------------------------------------------------------------------


def cosine(live: Live, one: str, other: str, name: str | None = None) -> float:
    first, second = state(live, one, name), state(live, other, name)
    return float(unit(first) @ unit(second))


PAIRS = [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")]


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_take_every_pair_of_names(live: Live, path: str, names: tuple[str, str]) -> None:
    first, second = names
    for ones, others in (
        ("a", "b"),
        ("a", ["b", "c"]),
        (["a"], ["b", "c"]),
        (["a", "b"], ["c"] * 2),
    ):
        found = answer(live, path, {"model": BASE, first: ones, second: others})
        listed = [*ones] if isinstance(ones, list) else [ones]
        wanted = [*others] if isinstance(others, list) else [others]
        pairs = zip(listed * len(wanted) if len(listed) == 1 else listed, wanted, strict=True)
        expected = [cosine(live, *pair) for pair in pairs]
        np.testing.assert_allclose([i["score"] for i in found["data"]], expected, rtol=1e-6)
        assert [i["index"] for i in found["data"]] == list(range(len(expected)))
        assert found["usage"]["prompt_tokens"] == len(listed) + len(wanted)


def test_texts_may_be_objects(live: Live) -> None:
    part = {"content": [{"type": "text", "text": "b"}]}
    found = answer(live, "/score", {"model": BASE, "text_1": {"text": "a"}, "text_2": [part, "c"]})
    expected = [cosine(live, "a", "b"), cosine(live, "a", "c")]
    np.testing.assert_allclose([i["score"] for i in found["data"]], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "queries"),
        ({"queries": "a"}, "queries"),
        ({"queries": "a", "text_2": "b"}, "queries"),
        ({"queries": "a", "documents": "b", "items": "c"}, "queries"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_2"),
        ({"text_1": [], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
        ({"text_1": "a", "text_2": [1]}, "text_2"),
        ({"text_1": "a", "text_2": {"image_url": "x"}}, "text_2"),
        ({"text_1": "a", "text_2": "\ud800"}, "text_2"),
        ({"text_1": "a", "text_2": "b", "instruction": "judge"}, "instruction"),
        ({"text_1": "a", "text_2": "b", "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ({"text_1": "a", "text_2": "b", "max_tokens_per_doc": 64}, "max_tokens_per_doc"),
        ({"text_1": "a", "text_2": "b", "max_tokens_per_query": 2**62}, "max_tokens_per_query"),
        ({"text_1": "a", "text_2": "x" * 65}, "text_2"),
        ({"text_1": "x" * 65, "text_2": "a"}, "text_2"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens"),
        ({"model": "kinds", "text_1": "a", "text_2": "b"}, "model"),
    ],
)
def test_pairs_that_can_not_be_scored_are_refused_by_name(
    live: Live, body: dict[str, Any], param: str
) -> None:
    assert error(live, "/score", {"model": BASE, **body})["param"] == param


def test_limits_cut_queries_and_documents(live: Live) -> None:
    body = {"model": BASE, "text_1": "abcd", "text_2": ["efgh", "i"]}
    found = answer(live, "/score", {**body, "max_tokens_per_query": 2, "max_tokens_per_doc": 3})
    expected = [cosine(live, "ab", "efg"), cosine(live, "ab", "i")]
    np.testing.assert_allclose([i["score"] for i in found["data"]], expected, rtol=1e-6)
    cut = answer(live, "/score", {**body, "truncate_prompt_tokens": 1, "truncation_side": "left"})
    np.testing.assert_allclose(cut["data"][0]["score"], cosine(live, "d", "h"), rtol=1e-6)


def test_a_head_of_one_class_reads_both_texts_together(live: Live) -> None:
    found = answer(live, "/score", {"model": "fit", "text_1": "ab", "text_2": ["c", "d"]})
    expected = [probabilities(live, text, "fit")[0] for text in ("abc", "abd")]
    np.testing.assert_allclose([i["score"] for i in found["data"]], expected, rtol=1e-6)
    assert found["usage"]["prompt_tokens"] == 6
    long = {"model": "fit", "text_1": "x" * 40, "text_2": "y" * 40}
    assert error(live, "/score", long)["code"] == "context_length_exceeded"
    assert answer(live, "/score", {**long, "truncate_prompt_tokens": 9})["data"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("name", [None, "sql"])
def test_documents_are_ranked(live: Live, path: str, name: str | None) -> None:
    documents = ["d1", "d22", "d333", "d4444"]
    body = {"model": name or BASE, "query": "q", "documents": documents}
    scores = [cosine(live, "q", document, name) for document in documents]
    order = sorted(range(4), key=lambda index: -scores[index])
    found = answer(live, path, body)
    assert [result["index"] for result in found["results"]] == order
    assert [result["document"]["text"] for result in found["results"]] == [
        documents[index] for index in order
    ]
    np.testing.assert_allclose(
        [result["relevance_score"] for result in found["results"]],
        sorted(scores, reverse=True),
        rtol=1e-6,
    )
    best = answer(live, path, {**body, "top_n": 2, "return_documents": False})["results"]
    assert [result["index"] for result in best] == order[:2]
    assert all("document" not in result for result in best)
    objects = [{"text": document} for document in documents]
    assert (
        answer(live, path, {**body, "documents": objects, "top_n": 9})["results"]
        == (found["results"])
    )


def test_an_experiment_chooses_what_scores(live: Live) -> None:
    variants = [{"name": "a", "model": BASE, "weight": 0}, {"name": "b", "model": "fit"}]
    made = live.post("/v1/experiments", {"name": "ranking", "variants": variants})
    assert made.status_code == 201, made.text
    found = answer(live, "/rerank", {"model": "ranking", "query": "a", "documents": ["b"]})
    assert found["quickchange"] == {"experiment": "ranking", "variant": "b"}
    expected = probabilities(live, "ab", "fit")[0]
    np.testing.assert_allclose(found["results"][0]["relevance_score"], expected, rtol=1e-6)
