"""HTTP responses counted by route, method and status, refusals included.

A route is counted under its template (`/v1/adapters/{ref}`), so that clients can't grow the set of
label values; requests that match no route are counted under "none".
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """The metrics of the HTTP server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._responses = Counter(
            "quickchange_http_responses_total",
            "HTTP responses that began, by route template and status",
            ["route", "method", "status"],
            registry=registry,
        )
        self._series: dict[tuple[str, str, int], Counter] = {}  # cache of labelled counters

    def response(self, route: str, method: str, status: int) -> None:
        key = (route, method if method in METHODS else "other", status)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._responses.labels(key[0], key[1], str(status))
        series.inc()


class HttpMetricsMiddleware:
    """ASGI middleware that counts every response in `app.state.services.metrics.http`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                http: HttpMetrics = scope["app"].state.services.metrics.http
                route = getattr(scope.get("route"), "path", NO_ROUTE)
                http.response(route, scope["method"], message["status"])
            await send(message)

        await self._app(scope, receive, send_counted)
