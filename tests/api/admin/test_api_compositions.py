"""Sums of adapters under a name over HTTP, and rank limits for adapters that are no LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from http_support import BASE, MODULE, Live, live_server, make_adapter
from safetensors.torch import save_file

COMPLETION = {"prompt": "Hello", "seed": 1, "max_tokens": 4}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("store")) as made:
        for value, name in enumerate(("orders", "sql"), 1):
            made.store.add(name, make_adapter(float(value)))
        yield made


def text_of(live: Live, **fields: Any) -> str:
    response = live.post("/v1/completions", {**COMPLETION, **fields})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def composed(live: Live, name: str, *terms: dict[str, Any]) -> Any:
    return live.post("/v1/adapters", {"name": name, "adapters": list(terms)})


def test_a_named_composition_answers_as_the_one_that_a_request_lists(live: Live) -> None:
    terms = [{"id": "orders", "weight": 0.7}, {"id": "sql", "weight": -0.2}]
    assert composed(live, "both", *terms).status_code == 201
    assert text_of(live, model="both") == text_of(live, model=BASE, adapters=terms)
    assert text_of(live, model="both") != text_of(live, model="orders")
    spans = [{**terms[0], "end": 6}, {**terms[1], "begin": 6}]
    assert composed(live, "scheduled", *spans).status_code == 201
    assert text_of(live, model="scheduled") == text_of(live, model=BASE, adapters=spans)
    assert text_of(live, model="scheduled") != text_of(live, model="both")
    halves = [{"id": "both", "weight": 0.5}, {"id": "orders", "weight": 0.15}]
    sums = [{"id": "orders", "weight": 0.5}, {"id": "sql", "weight": -0.1}]
    assert text_of(live, model=BASE, adapters=halves) == text_of(live, model=BASE, adapters=sums)


def test_scaled_modules_are_a_version_of_their_own(live: Live) -> None:
    added = composed(live, "half", {"id": "orders", "scales": {"*": 0.5}})
    assert added.status_code == 201
    info = live.http.get("/v1/adapters/half").json()["info"]
    (term,) = info["composition"]
    assert info["kind"] == "composition"
    assert live.store.load(term["digest"]).updates[MODULE].scale == 0.5
    assert text_of(live, model="half") != text_of(live, model="orders")


def test_pins_and_prefetches_are_for_the_terms(live: Live) -> None:
    composed(live, "both", {"id": "orders"}, {"id": "sql"})
    digests = [live.store.resolve(name).digest for name in ("orders", "sql")]
    told = live.post("/v1/adapters/both/pin", {}).json()["residency"]
    assert told["pinned"]
    for name in ("orders", "sql"):
        assert live.http.get(f"/v1/adapters/{name}").json()["residency"]["pinned"]
    live.post("/v1/adapters/sql/unpin", {})
    assert not live.http.get("/v1/adapters/both").json()["residency"]["pinned"]
    live.post("/v1/adapters/both/unpin", {})
    assert set(live.store.resolve("both").served) == set(digests)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"name": "x", "adapters": []}, "adapters"),
        ({"name": "x", "adapters": [{"id": "missing"}]}, "missing"),
        ({"name": "x", "adapters": [{"id": "orders", "scales": {"*.none": 2}}]}, r"*.none"),
        ({"name": "x", "adapters": [{"id": "orders", "weight": 1e30}]}, "weight"),
        ({"name": "x", "adapters": [{"id": "orders"}], "path": "/"}, "path"),
        ({"name": "x", "path": "/", "approximate_rank": 0}, "approximate_rank"),
        ({"name": "x", "path": "/", "exact_rank": 1 << 20}, "exact_rank"),
    ],
)
def test_a_body_that_can_not_be_is_refused_by_its_field(
    live: Live, body: dict[str, Any], named: str
) -> None:
    refused = live.post("/v1/adapters", body)
    assert refused.status_code in (400, 404)
    assert named in refused.text
    assert "x" not in live.store.names()


def test_a_composition_can_not_have_the_base_models_name(live: Live) -> None:
    assert composed(live, BASE, {"id": "orders"}).status_code == 409


def test_an_update_without_a_low_rank_is_approximated_on_request(
    live: Live, tmp_path: Path
) -> None:
    config = {
        "peft_type": "FOURIERFT",
        "target_modules": ["q_proj"],
        "base_model_name_or_path": BASE,
        "n_frequency": 16,
        "scaling": 10.0,
    }
    spectrum = torch.randn(16, generator=torch.Generator().manual_seed(1))
    key = f"base_model.model.{MODULE}.fourierft_spectrum"
    save_file({key: spectrum}, tmp_path / "adapter_model.safetensors")
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (tmp_path / "adapter_model.safetensors").read_bytes(),
    }
    for rank, status in (({}, 400), ({"approximate_rank": "2"}, 201)):
        added = live.http.post("/v1/adapters", data={"name": "turned", **rank}, files=files)
        assert added.status_code == status, added.text
    source = live.http.get("/v1/adapters/turned").json()["info"]["source"]
    assert source["approximation"]["rank"] == 2
    wrong = live.http.post(
        "/v1/adapters", data={"name": "turned", "exact_rank": "many"}, files=files
    )
    assert wrong.status_code == 400
    assert "exact_rank" in wrong.text


def test_a_term_that_can_not_be_read_fails_its_requests_alone(live: Live) -> None:
    assert composed(live, "broken", {"id": "sql", "scales": {"*": 3.0}}).status_code == 201
    (term,) = live.store.resolve("broken").served
    live.store.path(term).with_name("info.json").write_text("{}")
    response = live.post("/v1/completions", {**COMPLETION, "model": "broken"})
    assert response.status_code == 424
    assert response.json()["error"]["param"] == "model"
    assert text_of(live, model="sql")
