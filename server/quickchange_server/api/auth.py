"""Authentication: the API key of every request, checked before anything reads its body.

`CallerMiddleware` finds the caller or answers 401; `OPEN` routes need no key. A route declares its
scope by the parameter types `Calling`, `Managing` and `Administering`, or, if it doesn't use the
caller, by `dependencies=[Depends(INFER)]` and so on.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ConnectionScope

from quickchange_server.api import page
from quickchange_server.api.app_state import Services
from quickchange_server.api.error_responses import refused
from quickchange_server.errors import ForbiddenError, UnauthenticatedError
from quickchange_server.frontend.caller import ANYONE, Caller, Scope

# Routes without a key: health checks, which reveal only the engine's state, and the page's files.
OPEN = frozenset(("GET", path) for path in page.PATHS) | frozenset(
    {
        ("GET", "/health"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/ping"),
        ("POST", "/ping"),
    }
)
METRICS_PATH = "/metrics"  # open by the setting `open_metrics`


class Needs:
    """FastAPI dependency: the caller, who must have the scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        """The request's caller. Raises ForbiddenError without the scope."""
        caller = request.state.caller
        assert isinstance(caller, Caller)
        if not caller.may(self.scope):
            raise ForbiddenError(
                f"this route needs an API key with the scope {self.scope!r}, and yours has "
                f"{caller.scope!r}"
            )
        return caller


INFER, MANAGE, ADMIN = Needs("infer"), Needs("manage"), Needs("admin")
Calling = Annotated[Caller, Depends(INFER)]
Managing = Annotated[Caller, Depends(MANAGE)]
Administering = Annotated[Caller, Depends(ADMIN)]


def check_own(caller: Caller, name: str, param: str) -> None:
    """Raise ForbiddenError if the caller could not see the name that it is about to create.

    Call it before any look-up, so that the error reveals nothing about existing names.
    """
    if not caller.sees(name):
        raise ForbiddenError(
            f"{param}: {name!r} is outside the names of your API key, {', '.join(caller.names)}",
            param=param,
        )


class CallerMiddleware:
    """ASGI middleware that sets `request.state.caller`, or answers 401."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["caller"] = _caller(scope)
            except UnauthenticatedError as error:
                response = refused(Request(scope, receive), error)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _caller(scope: ConnectionScope) -> Caller:
    services = scope["app"].state.services
    assert isinstance(services, Services)
    if services.keyring is None or _open(services, scope["method"], scope["path"]):
        return ANYONE
    return services.keyring.caller(_secret(Headers(scope=scope)))


def _open(services: Services, method: str, path: str) -> bool:
    metrics = path == METRICS_PATH and services.settings.open_metrics
    return metrics or (method, path) in OPEN


def _secret(headers: Headers) -> str | None:
    """The request's API key, from OpenAI's header or Anthropic's."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    return headers.get("x-api-key")
