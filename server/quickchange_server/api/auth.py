"""Who calls: the API key of every request is checked here, before anything reads its body.

`CallerMiddleware` finds the caller or answers 401; what is `OPEN` needs none. Each route then
declares the scope that it needs by one of `Calling`, `Managing`, `Administering`, or, where it has
no use for the caller, by `dependencies=[Depends(INFER)]` and so on.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ConnectionScope

from quickchange_server.api import page
from quickchange_server.api.app_state import Services
from quickchange_server.errors import ForbiddenError, QuickchangeError, UnauthenticatedError
from quickchange_server.frontend.caller import ANYONE, Caller, Scope

# What load balancers and orchestrators ask, which tells nothing but the engine's state, and the
# page's files, which hold no data.
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
    """A dependency: the caller, who must have the scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        """Raises ForbiddenError."""
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
    """Raise ForbiddenError where a caller would make a name that it could not see.

    To be asked before anything is looked up, so that it tells nothing of what there is.
    """
    if not caller.sees(name):
        raise ForbiddenError(
            f"{param}: {name!r} is outside the names of your API key, {', '.join(caller.names)}",
            param=param,
        )


class CallerMiddleware:
    """Sets `request.state.caller`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["caller"] = _caller(scope)
            except UnauthenticatedError as error:
                response = await _refused(scope, receive, error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refused(
    scope: ConnectionScope, receive: Receive, error: UnauthenticatedError
) -> Response:
    """The app's own answer to this error, in the path's style."""
    handler = scope["app"].exception_handlers[QuickchangeError]
    response = await handler(Request(scope, receive), error)
    assert isinstance(response, Response)
    response.headers["WWW-Authenticate"] = "Bearer"
    return response


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
    """The key that a request brings, in OpenAI's or in Anthropic's header."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    return headers.get("x-api-key")
