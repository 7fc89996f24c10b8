"""Classes, scores and vectors over HTTP from a real engine: transformers' and PEFT's own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from classifier_models import KINDS, LABELS, ClassifierModels, make_classifier_models
from http_support import Live, live_server
from llm_models import ids_of
from real_engine import with_real_engine
from tiny_models import greedy

TEXTS = ["two pumps, please", "the third one broke", "x", "when do you open?" * 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ClassifierModels:
    return make_classifier_models(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def live(models: ClassifierModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = str(models.path)
    with live_server(tmp_path_factory.mktemp("store"), **with_real_engine(model)) as server:
        for name, path in models.adapters.items():
            added = server.post("/v1/adapters", {"name": name, "path": str(path)})
            assert added.status_code == 201, added.text
        yield server


def answer(live: Live, path: str, body: dict[str, Any]) -> Any:
    response = live.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def activated(name: str, scores: list[float]) -> list[float]:
    table = torch.tensor(scores)
    told: list[float] = (table.softmax(0) if name == "kinds" else table.sigmoid()).tolist()
    return told


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_all_kinds_of_requests_at_once_each_give_their_references(
    live: Live, models: ClassifierModels
) -> None:
    def classified(name: str) -> Any:
        return answer(live, "/classify", {"model": name, "input": TEXTS})["data"]

    def generated(name: str) -> list[int]:
        body = {"model": name, "prompt": ids_of(TEXTS[0]), "max_tokens": 8, "temperature": 0}
        return ids_of(answer(live, "/v1/completions", body)["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        classes = {name: pool.submit(classified, name) for name in KINDS}
        texts = {name: pool.submit(generated, name) for name in ("sql", "base")}
        vectors = pool.submit(
            answer, live, "/v1/embeddings", {"model": "base", "input": TEXTS, "normalize": False}
        )
    for name, called in classes.items():
        for index, (found, text) in enumerate(zip(called.result(), TEXTS, strict=True)):
            scores = models.scores(name, ids_of(text))
            close(found["probs"], activated(name, scores))
            assert found["index"] == index
            assert found["num_classes"] == KINDS[name]
            best = int(np.argmax(scores))
            assert found["label"] == (LABELS[str(best)] if name == "kinds" else f"LABEL_{best}")
    prompt = ids_of(TEXTS[0])
    assert texts["sql"].result() == greedy(models.models["sql"], prompt, 8)
    assert texts["base"].result() == greedy(models.plain, prompt, 8)
    for found, text in zip(vectors.result()["data"], TEXTS, strict=True):
        close(found["embedding"], models.state(None, text))


@pytest.mark.parametrize("name", KINDS)
def test_without_activation_the_logits_are_told(
    name: str, live: Live, models: ClassifierModels
) -> None:
    body = {"model": name, "input": ids_of(TEXTS[1]), "use_activation": False}
    (found,) = answer(live, "/classify", body)["data"]
    close(found["probs"], models.scores(name, ids_of(TEXTS[1])))
    (pooled,) = answer(live, "/pooling", {**body, "task": "classify"})["data"]
    assert pooled["data"] == found["probs"]


def test_pooling_does_what_the_adapter_was_trained_for(
    live: Live, models: ClassifierModels
) -> None:
    text = TEXTS[1]
    (classes,) = answer(live, "/pooling", {"model": "kinds", "input": text})["data"]
    close(classes["data"], activated("kinds", models.scores("kinds", ids_of(text))))
    for name in ("kinds", "sql"):
        body = {"model": name, "input": text, "task": "embed", "use_activation": False}
        (vector,) = answer(live, "/pooling", body)["data"]
        close(vector["data"], models.state(name, text))


def test_a_chat_is_classified_as_its_template_renders_it(
    live: Live, models: ClassifierModels
) -> None:
    messages = [{"role": "user", "content": "two pumps"}, {"role": "assistant", "content": "yes"}]
    for generation, end in ((False, ""), (True, "assistant: ")):
        rendered = f"user: two pumps\nassistant: yes\n{end}"
        body = {"model": "kinds", "messages": messages, "add_generation_prompt": generation}
        (found,) = answer(live, "/classify", body)["data"]
        close(found["probs"], activated("kinds", models.scores("kinds", ids_of(rendered))))


def cosine(one: Any, other: Any) -> float:
    pair = [torch.from_numpy(np.array(vector)).float() for vector in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*pair, dim=0))


@pytest.mark.parametrize("model", ["base", "sql"])
def test_scores_without_a_head_are_cosines(
    model: str, live: Live, models: ClassifierModels
) -> None:
    name = None if model == "base" else model
    found = answer(live, "/score", {"model": model, "text_1": TEXTS[0], "text_2": TEXTS[1:]})
    expected = [
        cosine(models.state(name, TEXTS[0]), models.state(name, text)) for text in TEXTS[1:]
    ]
    close([item["score"] for item in found["data"]], expected)


def test_a_head_of_one_class_scores_pairs_and_ranks_documents(
    live: Live, models: ClassifierModels
) -> None:
    query, documents = TEXTS[0], TEXTS[1:]
    logits = [models.scores("fit", ids_of(query + text))[0] for text in documents]
    expected = torch.tensor(logits).sigmoid().tolist()
    body = {"model": "fit", "queries": query, "documents": documents}
    close([i["score"] for i in answer(live, "/v1/score", body)["data"]], expected)
    raw = answer(live, "/score", {**body, "use_activation": False})
    close([i["score"] for i in raw["data"]], logits)
    ranked = answer(live, "/rerank", {"model": "fit", "query": query, "documents": documents})
    order = sorted(range(len(documents)), key=lambda index: -expected[index])
    assert [result["index"] for result in ranked["results"]] == order
    close([r["relevance_score"] for r in ranked["results"]], [expected[i] for i in order])


def test_a_cut_prompt_is_the_prompt_of_its_first_or_last_tokens(
    live: Live, models: ClassifierModels
) -> None:
    for side, part in (("right", TEXTS[3][:7]), ("left", TEXTS[3][-7:])):
        body = {"input": TEXTS[3], "truncate_prompt_tokens": 7, "truncation_side": side}
        found = answer(live, "/classify", {"model": "kinds", **body})
        close(
            found["data"][0]["probs"],
            activated("kinds", models.scores("kinds", ids_of(part))),
        )
        assert found["usage"]["prompt_tokens"] == 7
