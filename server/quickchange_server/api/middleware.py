"""ASGI middleware for every request: its path and method, an id, and limits on the body."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.error_responses import internal_error, refused
from quickchange_server.api.json_bodies import Structure
from quickchange_server.errors import InvalidRequestError
from quickchange_server.observability.naming.request_ids import arrive

logger = logging.getLogger(__name__)

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class PathMiddleware:
    """Treats all routes alike: a trailing slash counts for nothing, HEAD is GET without its body,
    OPTIONS is answered, and `Allow` has every method of the path.

    All behind it sees paths as routes have them: `root_path`, by which a proxy's clients ask, is
    off, whether or not the proxy took it off.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        root = self._root_path if self._is_whole(scope) else ""
        asked = {
            **scope,  # a copy: the server itself goes by the method that came
            "path": scope["path"].removeprefix(root).rstrip("/") or "/",
            "raw_path": scope["raw_path"].removeprefix(root.encode()).rstrip(b"/") or b"/",
            "method": "GET" if method == "HEAD" else method,
        }
        bodyless = method == "HEAD"

        async def send_alike(message: Message) -> None:
            nonlocal bodyless
            if message["type"] == "http.response.start" and message["status"] == 405:
                message = {**message, "headers": [*message["headers"]]}
                headers = MutableHeaders(scope=message)
                headers["Allow"] = ", ".join(_allowed(asked))
                if method == "OPTIONS":
                    bodyless, message["status"] = True, 204
                    del headers["content-type"], headers["content-length"]
            elif message["type"] == "http.response.body" and bodyless:
                message = {**message, "body": b""}
            await send(message)

        await self._app(asked, receive, send_alike)

    def _is_whole(self, scope: Scope) -> bool:
        """True if the path still has the root path: it begins so, and no route of ours does."""
        path, root = scope["path"], self._root_path
        if not root or not f"{path}/".startswith(f"{root}/"):
            return False
        routes = scope["app"].router.routes
        return all(route.matches(scope)[0] is Match.NONE for route in routes)


def _allowed(scope: Scope) -> list[str]:
    """Methods of a path; Starlette's own list has those of the first matching route alone."""
    found = [
        method
        for method in _METHODS
        if any(
            route.matches({**scope, "method": method})[0] is Match.FULL
            for route in scope["app"].router.routes
        )
    ]
    return [*found, *(["HEAD"] if "GET" in found else []), "OPTIONS"]


class RequestIdMiddleware:
    """Gives each response the client's `x-request-id`, or a new one, and what the request's work
    has left for its headers.

    An unhandled exception is logged under that id and answered with 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        arrived = arrive(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["request_id"] = arrived.request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(arrived.headers)
                # the second is Anthropic's name of it
                headers["x-request-id"] = headers["request-id"] = arrived.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s to %s failed", arrived.request_id, scope["path"])
            if not started:
                response = refused(Request(scope, receive), internal_error())
                await response(scope, receive, send_with_id)


class BodyLimitMiddleware:
    """Refuses bodies over `limit` bytes with 413, and JSON with too many parts with 400.

    An upload to the path `uploads` has a limit of its own.
    """

    def __init__(self, app: ASGIApp, limit: int, uploads: str, upload_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._uploads = uploads
        self._upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = self._is_upload(scope, headers)
        limit = self._upload_limit if upload else self._limit
        setting = "max_upload_bytes" if upload else "max_request_bytes"
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            refusal = InvalidRequestError(_too_large(limit, setting))
            response = refused(Request(scope, receive), refusal, 413)
            await response(scope, receive, send)
            return
        received, structure = 0, None if upload else Structure()
        more = "expect" not in headers  # else the client waits before it sends the body

        async def receive_bounded() -> Message:
            nonlocal received, more
            message = await receive()
            more = more and message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit, setting))
            if structure is not None:
                structure.add(message.get("body", b""))
            return message

        async def send_after_body(message: Message) -> None:
            """Send, once the client has: one that still sends sees no answer, but a reset."""
            nonlocal received, more
            while more and received <= self._limit:
                rest = await receive()
                more = rest.get("more_body", False)
                received += len(rest.get("body", b""))
            await send(message)

        await self._app(scope, receive_bounded, send_after_body)

    def _is_upload(self, scope: Scope, headers: Headers) -> bool:
        kind = headers.get("content-type", "")
        return kind.startswith("multipart/form-data") and scope["path"] == self._uploads


def _too_large(limit: int, setting: str) -> str:
    return f"the body exceeds {limit} bytes, the setting {setting}; send less, or raise it"
