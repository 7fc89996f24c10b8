"""Declarations for a route's `responses=`: errors, event streams and plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from quickchange_server.api.openapi.message_models import MessageErrorBody
from quickchange_server.api.openapi.response_models import ErrorBody, LoraxErrorBody

Responses = dict[int | str, dict[str, Any]]

_REFERENCE = "#/components/schemas/{model}"
_MEANINGS: Mapping[int, str] = {
    400: "A field is wrong: `param` is its place",
    401: "The server asks for API keys, and there is none or it is not valid",
    403: "Switched off by a setting, beyond the API key's scope or names, or from a page elsewhere",
    404: "There is no such name, or the API key does not see it",
    409: "The name is taken, or what is to be changed is in use or in another state",
    413: "The body is too large",
    422: "A field is wrong, or the route is not supported",
    424: "The adapter could not be loaded, or the request ended the engine repeatedly",
    429: "No room, in the queue or in a limit of the API key; see `Retry-After`",
    500: "The engine failed inside the request, or an error that nobody foresaw",
    507: "A disk of the server is full",
    503: "The server starts, drains or has failed, or its database is away; see `Retry-After`",
}


def errors(*statuses: int) -> Responses:
    """Error responses in OpenAI's form, by status."""
    return {s: {"model": ErrorBody, "description": _MEANINGS[s]} for s in statuses}


def lorax_errors(*statuses: int) -> Responses:
    """Error responses in LoRAX's form, by status."""
    return {s: {"model": LoraxErrorBody, "description": _MEANINGS[s]} for s in statuses}


def message_errors(*statuses: int) -> Responses:
    """Error responses in Anthropic's form, by status."""
    return {s: {"model": MessageErrorBody, "description": _MEANINGS[s]} for s in statuses}


# A wrong field, no API key, a missing scope or a page of another origin, an internal error, an
# engine that is not ready, a full disk.
COMMON_ERRORS = errors(400, 401, 403, 500, 503, 507)
GENERATION_ERRORS = errors(404, 413, 424, 429)

# A route that does not answer JSON needs response_class=Response, or FastAPI documents its errors
# under the answer's content type.
PLAIN_TEXT: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

# Vectors as their bytes, where a body asks for them so.
OCTETS: Responses = {200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}}


def parsed_body(data: Any) -> dict[str, Any]:
    """Schema of a JSON body of this type that a route parses itself."""
    # openapi_document.py moves what several share to where references point
    return TypeAdapter(data).json_schema(ref_template=_REFERENCE)


def events(data: Any, *, last: str | None = None) -> Responses:
    """A stream of server-sent events with JSON data of this type, ended by the literal `last`.

    OpenAPI 3.1 can't describe a stream, so the schema is that of one event.
    """
    content = TypeAdapter(data).json_schema(ref_template=_REFERENCE)
    shared = content.pop("$defs")  # openapi_document.py moves them to where references point
    shown: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": content,
    }
    if last is not None:
        shown = {"anyOf": [shown, {"const": last}]}
    event = {"type": "object", "properties": {"data": shown}, "required": ["data"], "$defs": shared}
    return {200: {"content": {"text/event-stream": {"schema": event}}}}
