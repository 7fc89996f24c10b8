"""An ingress asks for keys by the address of Serve's proxies, whatever the settings say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from quickchange_server.api.browser import BrowserMiddleware
from quickchange_server.cluster import ingress_deployment, serve_replica
from quickchange_server.cluster.ingress_deployment import IngressReplica
from quickchange_server.config import Settings
from quickchange_server.tenants.tenancy import asks_for_keys


def settings_of_app(monkeypatch: pytest.MonkeyPatch, proxy: str | None, **given: Any) -> Settings:
    """The settings that the ingress's application gets."""
    seen: list[Settings] = []

    def create_app(settings: Settings, **_parts: Any) -> Any:
        seen.append(settings)
        return SimpleNamespace(state=SimpleNamespace())

    async def make() -> None:
        settings = Settings(model="m", store=Path("s"), **given)
        IngressReplica(settings, SimpleNamespace(options=dict), None)

    for name, value in (("label", "ingress-x"), ("node", "n"), ("log", None)):
        monkeypatch.setattr(serve_replica, name, lambda value=value: value)
    monkeypatch.setattr(serve_replica, "proxy_host", lambda: proxy)
    monkeypatch.setattr(ingress_deployment, "create_app", create_app)
    asyncio.run(make())
    return seen[0]


@pytest.mark.parametrize(
    ("proxy", "given", "asks"),
    [
        ("127.0.0.1", {}, False),
        ("0.0.0.0", {}, True),  # what `serve deploy` and RayService do by default
        ("::", {}, True),
        ("127.0.0.1", {"host": "0.0.0.0"}, False),
        ("0.0.0.0", {"allow_unauthenticated": True}, False),
        (None, {"host": "0.0.0.0"}, True),
    ],
)
def test_keys_are_asked_for_where_others_reach_the_proxies(
    monkeypatch: pytest.MonkeyPatch, proxy: str | None, given: dict[str, Any], asks: bool
) -> None:
    assert asks_for_keys(settings_of_app(monkeypatch, proxy, **given)) is asks


def test_the_host_check_goes_by_the_proxies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of_app(monkeypatch, "0.0.0.0", allow_unauthenticated=True)
    assert BrowserMiddleware(None, settings)._is_mine("192.0.2.7")  # type: ignore[arg-type]
    settings = settings_of_app(monkeypatch, "127.0.0.1", host="0.0.0.0")
    assert not BrowserMiddleware(None, settings)._is_mine("192.0.2.7")  # type: ignore[arg-type]
