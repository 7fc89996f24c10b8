"""docs/lorax.md names every field, header and error of LoRAX's routes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import live_server, make_adapter
from pydantic import BaseModel

from quickchange_server import errors
from quickchange_server.api.lorax import routes
from quickchange_server.api.lorax.errors import lorax_error
from quickchange_server.api.lorax.requests import (
    CompatGenerateRequest,
    JsonGrammar,
    LoraxResponseFormat,
    MergedAdapters,
    Parameters,
    SchemaOfGrammar,
)
from quickchange_server.api.pooling import lorax_routes
from quickchange_store.store import Store

DOCS = (Path(__file__).parents[3] / "docs" / "lorax.md").read_text()
BODIES: list[type[BaseModel]] = [
    CompatGenerateRequest,
    Parameters,
    MergedAdapters,
    LoraxResponseFormat,
    JsonGrammar,
    SchemaOfGrammar,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_is_documented(body: type[BaseModel]) -> None:
    names = {field.alias or name for name, field in body.model_fields.items()}
    names |= set(getattr(body, "unsupported", ()))
    assert [name for name in names if not re.search(rf"[`\"]{name}[`\"]", DOCS)] == []


def test_every_route_is_documented() -> None:
    for route in (*routes.router.routes, *lorax_routes.router.routes):
        assert re.search(rf"(GET|POST) {route.path}`", DOCS), route.path  # type: ignore[attr-defined]


def test_every_header_and_every_field_of_an_answer_is_documented(tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"details": True, "top_k": 3, "max_new_tokens": 2}
    parameters |= {"top_n_tokens": 1, "adapter_id": "sql"}
    body = {"inputs": "x", "parameters": parameters}
    best = {**body, "parameters": {**parameters, "best_of": 2}}
    Store(tmp_path).add("sql", make_adapter(1.0))
    with live_server(tmp_path, Behaviour()) as live:
        response = live.post("/generate", best)
        streamed = live.post("/generate_stream", body)
        info = live.http.get("/info").json()
    assert [name for name in info if f"`{name}`" not in DOCS] == []
    whole_only = set(re.findall(r"^\| (.+) \|.*not on streams", DOCS, re.MULTILINE))
    told = {name for row in whole_only for name in re.findall(r"`(x-[a-z-]+)`", row)}
    assert told
    assert told == {name for name in response.headers if name not in streamed.headers} & told
    assert {n for n in response.headers if n.startswith("x-")} - told <= set(streamed.headers)
    headers = [name for name in response.headers if name.startswith("x-")]
    assert len(headers) > 10
    assert [name for name in headers if name != "x-request-id" and f"`{name}`" not in DOCS] == []
    details = response.json()["details"]
    names = {*details, *details["best_of_sequences"][0]}
    assert [name for name in names if f"`{name}`" not in DOCS] == []


def test_every_error_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        status, name, _ = lorax_error(kind("x"))
        assert f"`{name}`" in DOCS, name
        assert re.search(rf"^\| .*\b{status}\b", DOCS, re.MULTILINE), status
