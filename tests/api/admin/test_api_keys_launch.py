"""When the server asks for keys, when it refuses to start, and `quickchange keys`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from http_support import live_server
from keys_support import client_of, make_key
from typer.testing import CliRunner, Result

from quickchange_server import cli
from quickchange_server.config import Settings
from quickchange_server.entrypoints import serve
from quickchange_server.errors import SettingError
from quickchange_server.tenants.tenancy import asks_for_keys


def settings(**given: Any) -> Settings:
    return Settings(**{"model": "m", "store": Path("s"), **given})


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "example.org"}, True),
        ({"api_keys": True}, True),
        ({"host": "0.0.0.0", "api_keys": True}, True),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, False),
        ({"host": "0.0.0.0", "allow_unauthenticated": True, "api_keys": False}, False),
        ({"allow_unauthenticated": True}, False),
        ({"api_keys": False}, False),
    ],
)
def test_keys_are_asked_for_by_default_where_others_reach_the_server(
    given: dict[str, Any], asks: bool
) -> None:
    assert asks_for_keys(settings(**given)) is asks


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"host": "0.0.0.0", "api_keys": False}, "api_keys"),
        ({"api_keys": True, "allow_unauthenticated": True}, "allow_unauthenticated"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError) as raised:
        asks_for_keys(settings(**given))
    assert raised.value.param == named


def refusal(store: Path, **given: Any) -> str:
    with pytest.raises(SettingError) as raised:
        serve.check_access(settings(store=store, **given))
    return str(raised.value)


@pytest.mark.parametrize("given", [{"host": "0.0.0.0"}, {"api_keys": True}])
def test_without_a_valid_key_the_server_does_not_start(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    said = refusal(tmp_path, **given)
    assert "`quickchange keys create`" in said
    assert "--allow-unauthenticated" in said
    make_key(tmp_path, expires=int(time.time()) - 1)
    assert refusal(tmp_path, **given) == said
    make_key(tmp_path)
    serve.check_access(settings(store=tmp_path, **given))


def keys(store: Path, *arguments: str, code: int = 0) -> Result:
    """`quickchange keys ...`"""
    result = CliRunner().invoke(cli.app, ["keys", *arguments, "--store", str(store)])
    assert result.exit_code == code, result.output
    return result


def test_the_first_key_is_made_before_there_is_a_server(tmp_path: Path) -> None:
    secret = keys(tmp_path, "create", "--tenant", "me", "--scope", "admin").stdout.strip()
    with live_server(tmp_path, api_keys=True) as live, client_of(live, secret) as client:
        (shown,) = client.get("/v1/keys").json()["data"]
    assert (shown["tenant"], shown["scope"], shown["names"]) == ("me", "admin", ["*"])


def test_create_takes_everything_that_a_key_has(tmp_path: Path) -> None:
    options = ["--tenant", "acme", "--names", "acme/*", "--names", "x", "--label", "robot"]
    options += ["--days", "2", "--requests-per-minute", "5", "--tokens-per-minute", "6"]
    options += ["--concurrent-requests", "7", "--max-prompt-tokens", "8", "--max-new-tokens", "9"]
    made = json.loads(keys(tmp_path, "create", *options, "--json").stdout)
    assert made["secret"].startswith(f"qc-{made['id']}-")
    assert (made["tenant"], made["scope"], made["label"]) == ("acme", "infer", "robot")
    assert made["names"] == ["acme/*", "x"]
    assert list(made["limits"].values()) == [5, 6, 7, 8, 9]
    assert made["expires"] == pytest.approx(time.time() + 2 * 86_400, abs=60)


def test_list_rotate_and_revoke(tmp_path: Path) -> None:
    created = json.loads(
        keys(tmp_path, "create", "--tenant", "acme", "--names", "*", "--json").stdout
    )
    new = keys(tmp_path, "rotate", created["id"], "--overlap", "0").stdout.strip()
    assert new != created["secret"]
    assert new.startswith(f"qc-{created['id']}-")
    keys(tmp_path, "revoke", created["id"])
    lines = keys(tmp_path, "list").stdout.splitlines()
    assert lines[0].split()[:4] == ["ID", "TENANT", "SCOPE", "STATE"]
    assert lines[1].split()[:4] == [created["id"], "acme", "infer", "revoked"]
    assert new not in "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--tenant", "a b", "--names", "*"), "tenant"),
        (("create", "--tenant", "acme"), "names: is required"),
        (("revoke", "nobody"), "no API key 'nobody'"),
        (("rotate", "nobody"), "no API key 'nobody'"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    keys(tmp_path, "create", "--tenant", "acme", "--names", "*")
    result = keys(tmp_path, *arguments, code=1)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_unknown_scope_is_refused(tmp_path: Path) -> None:
    result = keys(tmp_path, "create", "--tenant", "a", "--scope", "root", code=2)
    assert "infer, manage, admin" in result.stderr
