"""ASGI middleware for every request: a request id, and a limit on the body's size."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.error_responses import error_response, internal_error
from quickchange_server.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIdMiddleware:
    """Gives each response the client's `x-request-id`, or a new one.

    An unhandled exception is logged under that id and answered with 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s to %s failed", request_id, scope["path"])
            if not started:
                await error_response(internal_error())(scope, receive, send_with_id)


class BodyLimitMiddleware:
    """Refuses bodies over `limit` bytes with 413; the path `uploads` has a limit of its own."""

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
        limit, setting = self._bound(scope, headers)
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            refusal = error_response(InvalidRequestError(_too_large(limit, setting)), 413)
            await refusal(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit, setting))
            return message

        await self._app(scope, receive_bounded, send)

    def _bound(self, scope: Scope, headers: Headers) -> tuple[int, str]:
        upload = headers.get("content-type", "").startswith("multipart/form-data")
        if upload and scope["path"] == self._uploads:
            return self._upload_limit, "max_upload_bytes"
        return self._limit, "max_request_bytes"


def _too_large(limit: int, setting: str) -> str:
    return f"the body exceeds {limit} bytes, the setting {setting}; send less, or raise it"
