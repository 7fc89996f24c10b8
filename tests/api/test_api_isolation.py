"""A name that a caller doesn't see is, byte for byte, a name that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, make_adapter, make_turbo, write_peft
from keys_support import COMPLETION, client_of, created, keyed_server

from quickchange_store.store import Store

HIDDEN, ABSENT = "other/secret-one", "other/absent-two"  # of one length, outside acme's globs
assert len(HIDDEN) == len(ABSENT)

Ask = Callable[[httpx.Client, str], httpx.Response]


@dataclass(frozen=True)
class Isolated:
    live: Live
    acme: httpx.Client  # manages acme/*
    admin: httpx.Client


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    folder = tmp_path_factory.mktemp("isolation")
    store = Store(folder)
    for name, value in (("acme/sql", 1.0), ("acme/chat", 2.0), (HIDDEN, 3.0)):
        store.add(name, make_adapter(value))
    store.add("other/heads", make_turbo(4.0))
    store.add("acme/heads", make_turbo(5.0))
    store.alias("other/alias", HIDDEN)
    store.alias("acme/seen", "acme/sql")
    store.alias("acme/to-hidden", HIDDEN)  # an administrator's
    store.alias("acme/by-hidden", "acme/sql", "other/heads")
    store.alias("other/holds", "acme/chat")
    with keyed_server(folder) as live:
        _, secret = created(live, tenant="acme", scope="manage", names=["acme/*"])
        with client_of(live, secret) as acme:
            yield Isolated(live, acme, live.http)


def generate(path: str, **fields: Any) -> Ask:
    """A request whose every "NAME" is the name."""

    def ask(client: httpx.Client, name: str) -> httpx.Response:
        body = json.dumps(fields).replace("NAME", name)
        headers = {"Content-Type": "application/json"}
        return client.post(path, content=body, headers=headers)

    return ask


def plain(method: str, path: str, body: dict[str, Any] | None = None) -> Ask:
    def ask(client: httpx.Client, name: str) -> httpx.Response:
        content = None if body is None else json.dumps(body).replace("NAME", name)
        headers = {"Content-Type": "application/json"}
        return client.request(method, path.replace("NAME", name), content=content, headers=headers)

    return ask


PROMPT = {"prompt": "Hello", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
ASKS: dict[str, Ask] = {
    "completion": generate("/v1/completions", model="NAME", **PROMPT),
    "completion, streamed": generate("/v1/completions", model="NAME", stream=True, **PROMPT),
    "completion of a version": generate("/v1/completions", model="NAME@1", **PROMPT),
    "completion of no version": generate("/v1/completions", model="NAME@7", **PROMPT),
    "completion of a digest": generate("/v1/completions", model="NAME@0123abc", **PROMPT),
    "chat": generate("/v1/chat/completions", model="NAME", **CHAT),
    "embedding": generate("/v1/embeddings", model="NAME", input="x"),
    "LoRAX's vector": generate("/embed", inputs="x", parameters={"adapter_id": "NAME"}),
    "TGI's tokens": generate("/chat_tokenize", model="NAME", **CHAT),
    "class": generate("/classify", model="NAME", input="x"),
    "score": generate("/score", model="NAME", text_1="x", text_2="y"),
    "composition": generate("/v1/completions", model=BASE, adapters=[{"id": "NAME"}], **PROMPT),
    "composition with one's own": generate(
        "/v1/completions", model=BASE, adapters=[{"id": "acme/sql"}, {"id": "NAME"}], **PROMPT
    ),
    "turbo": generate("/v1/completions", model="acme/sql", turbo="NAME", **PROMPT),
    "tokenize": generate("/tokenize", model="NAME", prompt="x"),
    "detokenize": generate("/detokenize", model="NAME", tokens=[65]),
    "model": plain("GET", "/v1/models/NAME"),
    "model's version": plain("GET", "/v1/models/NAME@1"),
    "adapter": plain("GET", "/v1/adapters/NAME"),
    "adapter's version": plain("GET", "/v1/adapters/NAME@1"),
    "removal": plain("DELETE", "/v1/adapters/NAME"),
    "removal of a version": plain("DELETE", "/v1/adapters/NAME@1"),
    "rollback": plain("POST", "/v1/adapters/NAME/rollback"),
    "pin": plain("POST", "/v1/adapters/NAME/pin"),
    "unpin": plain("POST", "/v1/adapters/NAME/unpin"),
    "prefetch": plain("POST", "/v1/adapters/NAME/prefetch"),
    "upload": plain("POST", "/v1/adapters", {"name": "NAME", "path": "/no/such/folder"}),
    "alias": plain("PUT", "/v1/aliases/NAME", {"target": "acme/sql"}),
    "alias's target": plain("PUT", "/v1/aliases/acme/new", {"target": "NAME"}),
    "alias's version": plain("PUT", "/v1/aliases/acme/new", {"target": "NAME@1"}),
    "alias's turbo": plain("PUT", "/v1/aliases/acme/new", {"target": "acme/sql", "turbo": "NAME"}),
    "alias's removal": plain("DELETE", "/v1/aliases/NAME"),
    "vLLM's load": plain(
        "POST", "/v1/load_lora_adapter", {"lora_name": "NAME", "lora_path": "/no/such"}
    ),
    "vLLM's unload": plain("POST", "/v1/unload_lora_adapter", {"lora_name": "NAME"}),
}

OF_LORAX = frozenset({"LoRAX's vector", "TGI's tokens"})  # whose form has 424 for what is absent


def told(response: httpx.Response, name: str) -> tuple[int, dict[str, str], bytes]:
    """All that a response says, the name and what differs with every response aside."""
    dropped = ("x-request-id", "request-id", "date")
    headers = {n: v for n, v in response.headers.items() if n not in dropped}
    return response.status_code, headers, response.content.replace(name.encode(), b"NAME")


@pytest.mark.parametrize("hidden", [HIDDEN, "other/alias"])
@pytest.mark.parametrize("kind", ASKS)
def test_what_is_hidden_answers_as_what_is_absent(world: Isolated, kind: str, hidden: str) -> None:
    absent = ABSENT if len(hidden) == len(ABSENT) else "other/nosuc"
    assert len(absent) == len(hidden)
    answer = told(ASKS[kind](world.acme, hidden), hidden)
    assert answer == told(ASKS[kind](world.acme, absent), absent)
    assert answer[0] in ((424,) if kind in OF_LORAX else (403, 404))
    assert HIDDEN in world.live.store.names()


@pytest.mark.parametrize("hidden", ["acme/to-hidden", "acme/by-hidden"])
@pytest.mark.parametrize("kind", ["completion", "turbo", "tokenize", "model", "adapter", "pin"])
def test_an_alias_of_a_hidden_name_answers_as_an_absent_one(
    world: Isolated, kind: str, hidden: str
) -> None:
    answer = told(ASKS[kind](world.acme, hidden), hidden)
    assert answer == told(ASKS[kind](world.acme, "acme/to-absent"), "acme/to-absent")
    assert answer[0] == 404


@pytest.mark.parametrize("kind", ["completion", "turbo", "model", "adapter"])
def test_the_administrator_sees_what_others_do_not(world: Isolated, kind: str) -> None:
    name = "other/heads" if kind == "turbo" else HIDDEN
    assert ASKS[kind](world.admin, name).status_code == 200


def names_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [entry["id"] for entry in response.json()["data"]]


def test_lists_hold_what_is_seen(world: Isolated) -> None:
    adapters = names_of(world.acme.get("/v1/adapters"))
    assert adapters == ["acme/chat", "acme/heads", "acme/sql"]
    assert names_of(world.acme.get("/v1/aliases")) == ["acme/seen"]
    models = names_of(world.acme.get("/v1/models"))
    versions = [f"{name}@1" for name in adapters]
    assert sorted(models) == sorted([BASE, *adapters, *versions, "acme/seen"])
    assert HIDDEN in names_of(world.admin.get("/v1/models"))


def test_no_list_says_the_hidden_names(world: Isolated) -> None:
    for path in ("/v1/adapters", "/v1/aliases", "/v1/models", "/v1/adapters/acme/chat"):
        assert "other/" not in world.acme.get(path).text


def test_removing_what_a_hidden_alias_holds_does_not_name_it(world: Isolated) -> None:
    response = world.acme.delete("/v1/adapters/acme/chat")
    assert response.status_code == 409
    assert "other" not in response.text
    assert "other/holds" in world.admin.delete("/v1/adapters/acme/chat").text


def test_adding_over_a_hidden_alias_does_not_say_what_it_points_at(
    world: Isolated, tmp_path: Path
) -> None:
    folder = str(write_peft(tmp_path / "new"))
    response = world.acme.post("/v1/adapters", json={"name": "acme/to-hidden", "path": folder})
    assert response.status_code == 409
    assert "other" not in response.text


def test_one_s_own_names_work(world: Isolated, tmp_path: Path) -> None:
    folder = str(write_peft(tmp_path / "mine", 9.0))
    added = world.acme.post("/v1/adapters", json={"name": "acme/mine", "path": folder})
    assert added.status_code == 201, added.text
    body = {**COMPLETION, "model": "acme/mine"}
    assert world.acme.post("/v1/completions", json=body).status_code == 200
    aliased = world.acme.put("/v1/aliases/acme/own", json={"target": "acme/mine"})
    assert aliased.status_code == 200
    assert world.acme.post("/v1/completions", json={**body, "model": "acme/own"}).status_code == 200
    assert world.acme.delete("/v1/aliases/acme/own").status_code == 200
    assert world.acme.delete("/v1/adapters/acme/mine").status_code == 200


def test_the_base_exists_for_every_key(world: Isolated) -> None:
    assert world.acme.post("/v1/completions", json=COMPLETION).status_code == 200


def test_the_prefix_cache_is_salted_by_tenant_where_asked(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    for tenant_cache in (False, True):
        behaviour = Behaviour(journal=journal)
        with keyed_server(
            tmp_path / str(tenant_cache), behaviour=behaviour, tenant_cache=tenant_cache
        ) as live:
            for tenant in ("one", "two"):
                _, secret = created(live, tenant=tenant)
                with client_of(live, secret) as client:
                    client.post("/v1/completions", json=COMPLETION).raise_for_status()
    salts = [entry["salt"] for entry in entries(journal, "Submit")]
    assert salts == ["", "", "one", "two"]
