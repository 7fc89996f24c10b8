"""Misspelled names: the one meant is named, if the caller sees it, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_support import BASE, Live, make_adapter
from keys_support import created, keyed_server

COMPLETION = {"prompt": "Hello", "max_tokens": 1}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Adapters, an alias and an experiment of acme's, and the same of globex's."""
    with keyed_server(tmp_path_factory.mktemp("suggestions")) as live:
        for owner in ("acme", "globex"):
            live.store.add(f"{owner}/orders", make_adapter(1.0))
            live.store.alias(f"{owner}/stable", f"{owner}/orders")
            variants = [{"name": "a", "model": BASE}, {"name": "b", "model": f"{owner}/orders"}]
            body = {"name": f"{owner}/greeting", "variants": variants}
            assert live.post("/v1/experiments", body).status_code == 201
        yield live


@pytest.fixture(scope="module")
def acme(keyed: Live) -> dict[str, str]:
    """The headers of a key that sees acme's names alone, among those that begin with a or g."""
    _, secret = created(keyed, scope="manage", names=["acme/*", "*/ordrs", "*/stabel", "*/greetin"])
    return {"Authorization": f"Bearer {secret}"}


ASKED = [
    ("POST", "/v1/completions", "orders", "ordrs"),
    ("POST", "/v1/completions", "stable", "stabel"),
    ("POST", "/v1/completions", "greeting", "greetin"),
    ("GET", "/v1/models/{}", "orders", "ordrs"),
    ("GET", "/v1/models/{}", "greeting", "greetin"),
    ("GET", "/v1/adapters/{}", "orders", "ordrs"),
    ("GET", "/v1/adapters/{}@1", "orders", "ordrs"),
    ("DELETE", "/v1/adapters/{}", "orders", "ordrs"),
    ("POST", "/v1/adapters/{}/pin", "orders", "ordrs"),
    ("POST", "/v1/adapters/{}/rollback", "orders", "ordrs"),
    ("DELETE", "/v1/aliases/{}", "stable", "stabel"),
    ("GET", "/v1/experiments/{}", "greeting", "greetin"),
    ("GET", "/v1/experiments/{}/results", "greeting", "greetin"),
    ("POST", "/v1/experiments/{}/pause", "greeting", "greetin"),
]


def refusal(
    live: Live, headers: dict[str, str], method: str, path: str, name: str
) -> dict[str, Any]:
    body = {**COMPLETION, "model": name} if "{}" not in path else None
    answer = live.http.request(method, path.format(name), json=body, headers=headers)
    assert answer.status_code == 404, answer.text
    error = answer.json()["error"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(("method", "path", "meant", "typed"), ASKED)
def test_a_misspelled_name_is_told_with_the_one_meant(
    keyed: Live, acme: dict[str, str], method: str, path: str, meant: str, typed: str
) -> None:
    message = refusal(keyed, acme, method, path, f"acme/{typed}")["message"]
    assert f"did you mean 'acme/{meant}'?" in message


@pytest.mark.parametrize(("method", "path", "meant", "typed"), ASKED)
def test_a_name_that_the_caller_does_not_see_is_not_suggested(
    keyed: Live, acme: dict[str, str], method: str, path: str, meant: str, typed: str
) -> None:
    message = refusal(keyed, acme, method, path, f"globex/{typed}")["message"]
    assert f"globex/{meant}" not in message


def test_a_missing_version_is_told_with_those_there_are(keyed: Live, acme: dict[str, str]) -> None:
    message = refusal(keyed, acme, "GET", "/v1/adapters/{}", "acme/orders@9")["message"]
    assert "its versions are 1" in message
    assert "did you mean" not in message
