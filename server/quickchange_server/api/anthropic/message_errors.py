"""Errors in Anthropic's form, `{"type": "error", "error": {"type", "message"}, "request_id"}`."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request, Response

from quickchange_server.api.error_responses import refusal_response, shortened
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.request_base import Json

# Anthropic's names of the chat's fields that messages mention; longer names first.
_NAMES = (
    (re.compile(r"\btools\[(\d+)\]\.function\.parameters\b"), r"tools[\1].input_schema"),
    (re.compile(r"\btools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"\bresponse_format\.json_schema\b"), "output_config.format"),
    (re.compile(r"\bresponse_format\b"), "output_config.format"),
    (re.compile(r"\bmax_completion_tokens\b"), "max_tokens"),
    (re.compile(r"^stop\b(?=[:\[])"), "stop_sequences"),
    (re.compile(r"^parallel_tool_calls\b"), "tool_choice.disable_parallel_tool_use"),
)
THREAD = "thread"  # a field that Anthropic's library leaves out once it is told of by this code
_DETAILS = {THREAD: {"error_code": "thread_unsupported_request", "unsupported": [THREAD]}}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def kind_of(status: int) -> str:
    """Anthropic's `error.type` of a status."""
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")


def failure(error: QuickchangeError, status: int | None = None) -> Json:
    """The error's body, the same in a response and in a stream's event."""
    message = error.message
    for pattern, name in _NAMES:
        message = pattern.sub(name, message)
    kind = kind_of(error.status if status is None else status)
    told: Json = {"type": kind, "message": shortened(message)}
    if error.param in _DETAILS:
        told["details"] = _DETAILS[error.param]
    return {"type": "error", "error": told}


def refusal(request: Request, error: QuickchangeError, status: int | None = None) -> Response:
    """The response to a failed request."""
    body: dict[str, Any] = {**failure(error, status), "request_id": request.state.request_id}
    return refusal_response(body, error, error.status if status is None else status)
