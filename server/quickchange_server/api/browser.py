"""Requests that a browser sends for somebody else's page, refused wherever no API key protects.

Whoever reaches a server without keys is its operator, and a browser reaches it for every page that
it shows. Three headers that a page can't set tell such requests: `Origin`, `Sec-Fetch-Site`, and
`Host`, which has the page's own name where that was pointed at this server (DNS rebinding).
Programs send neither of the first two.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from quickchange_server.api.app_state import Services
from quickchange_server.api.auth import METRICS_PATH
from quickchange_server.api.error_responses import refused
from quickchange_server.config import Settings
from quickchange_server.errors import ForbiddenError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::([0-9]*))?")
_PORTS = {"http": "80", "https": "443"}
_ELSEWHERE = ("cross-site", "same-site")  # a site's other ports are the same site
EXPOSED = (  # response headers that a page of an allowed origin may read
    "x-request-id",
    "retry-after",
    "x-quickchange-adapter",
    "x-quickchange-experiment",
    "x-quickchange-variant",
)


class BrowserMiddleware:
    """ASGI middleware that answers 403 to what a page of another origin has sent."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        own = settings.host if settings.uds is None else settings.uds.name
        self._hosts = {"localhost", *map(_name, (own, *settings.allowed_hosts))}
        self._here = not settings.reachable  # only this machine's addresses lead here
        self._origins = settings.allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _unprotected(scope):
            problem = self._problem(scope["method"], Headers(scope=scope))
            if problem is not None:
                response = refused(Request(scope, receive), ForbiddenError(problem))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_mine(_name(host)):
            return (
                f"{host!r} is not a name of this server: a web page may have had its own name "
                "pointed here. If it is, give the setting allowed_host (--allowed-host NAME), or "
                "ask for API keys"
            )
        if origin is not None and origin.lower() in self._origins:
            return None
        if origin is not None and not _same(origin.lower(), host):
            return (
                f"a web page of {origin!r} has sent this, which is not an origin that may use this "
                "server. If it is, give the setting allowed_origin (--allowed-origin ORIGIN)"
            )
        if headers.get("sec-fetch-site") in _ELSEWHERE and not _is_link(method, headers):
            return (
                "a web page of another origin has sent this; only pages of the origins that the "
                "setting allowed_origin names may (--allowed-origin ORIGIN)"
            )
        return None

    def _is_mine(self, name: str) -> bool:
        if name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # Nobody can point an address elsewhere, so it is no rebinding.
        return address.is_loopback or not self._here


def _unprotected(scope: Scope) -> bool:
    """True if anyone is answered with data, or may change something.

    Health checks and the page's files are open as well, and have no data.
    """
    services = scope["app"].state.services
    assert isinstance(services, Services)
    open_metrics = services.settings.open_metrics and scope["path"] == METRICS_PATH
    return services.keyring is None or open_metrics


def _name(host: str) -> str:
    """The host's name or address without its port, as browsers compare it; "" if it has none."""
    if host.count(":") > 1 and not host.startswith("["):  # an IPv6 address, as settings have it
        return host.lower()
    found = _HOST.fullmatch(host.lower())
    return "" if found is None else found[1].strip("[]").removesuffix(".")


def _same(origin: str, host: str | None) -> bool:
    """True if the origin is this server's own, under the name that the request came by."""
    scheme, _, place = origin.partition("://")
    port = f":{_PORTS.get(scheme)}"
    return host is not None and place.removesuffix(port) == host.lower().removesuffix(port)


def _is_link(method: str, headers: Headers) -> bool:
    """True if a page's link leads here: the page that sent it can't read the answer."""
    shown = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return method == "GET" and shown == ("navigate", "document")
