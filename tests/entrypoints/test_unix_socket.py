"""The server on a Unix socket."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from http_support import LIMIT_SECONDS, live_server

from quickchange_server.adapter_registry.adapter_places import allowed_place
from quickchange_server.cluster.cluster_settings import ClusterSettings, for_replicas
from quickchange_server.config import Settings
from quickchange_server.entrypoints.http_server import bind, bound, url_of
from quickchange_server.errors import SettingError
from quickchange_server.tenants.tenancy import asks_for_keys


def settings(path: Path, **more: object) -> Settings:
    return Settings(model="m", store="s", uds=path, **more)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_requests_come_over_the_socket_under_its_names(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with live_server(tmp_path / "store", uds=path) as live:
        body = {"model": "tiny/base", "prompt": "Hello", "max_tokens": 2}
        assert live.http.post("/v1/completions", json=body).status_code == 200
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, timeout=LIMIT_SECONDS) as http:
            assert http.get("http://server.sock/version").status_code == 200
            assert http.get("http://evil.example/version").status_code == 403


def test_the_socket_goes_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bound(settings(path)) as listener:
        assert answers(path)
        assert url_of(settings(path), listener) == f"unix:{path}"
    assert not path.exists()


def test_a_successors_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bound(settings(path)):
        path.unlink()
        successor = bind(settings(path))
    with successor:
        assert answers(path)


def test_what_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    bind(settings(path)).close()
    assert path.exists()
    with bound(settings(path)):
        assert answers(path)


def test_what_another_listens_on_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bound(settings(path)):
        with pytest.raises(SettingError, match=r"uds: can't listen on .*in use"):
            bind(settings(path))
        assert answers(path)


@pytest.mark.parametrize("name", ["file", "folder", "missing/a.sock", "a" * 120])
def test_what_can_be_no_socket_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match="uds: can't listen on") as raised:
        bind(settings(tmp_path / name))
    assert raised.value.param == "uds"
    assert (tmp_path / "file").read_text() == "kept"


def test_only_this_machine_reaches_it_whatever_the_host(tmp_path: Path) -> None:
    open_host = settings(tmp_path / "a", host="0.0.0.0")
    assert not asks_for_keys(open_host)
    assert allowed_place(open_host, str(tmp_path), "path") == tmp_path
    assert asks_for_keys(settings(tmp_path / "a", api_keys=True))


def test_a_cluster_refuses_it_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--host and --port") as raised:
        for_replicas(settings(tmp_path / "a"), ClusterSettings(), cpus=2)
    assert raised.value.param == "uds"
