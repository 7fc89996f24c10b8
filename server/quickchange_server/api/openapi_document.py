"""The OpenAPI document: FastAPI's own, completed with what a route can't declare.

Schemas that streamed events share, API keys, and no 422 for a wrong field.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse

from quickchange_server.api.auth import METRICS_PATH, OPEN
from quickchange_server.config import Settings
from quickchange_server.frontend.request_base import Json

_VALIDATION = "HTTPValidationError"  # FastAPI's body for a wrong field, which no route uses


def install(app: FastAPI, settings: Settings, *, keyed: bool) -> None:
    """Complete the document of /openapi.json and /docs. `keyed`: requests need an API key."""
    unkeyed = OPEN | {("GET", METRICS_PATH)} if settings.open_metrics else OPEN
    made = app.openapi

    def whole() -> Json:
        if app.openapi_schema is None:
            document = made()
            _finish(document)
            if keyed:
                _secure(document, unkeyed)
        return made()

    app.openapi = whole  # type: ignore[method-assign]  # FastAPI's documented way
    place = f"{settings.root_path or ''}{app.openapi_url}"

    async def swagger(_: Request) -> HTMLResponse:
        return get_swagger_ui_html(openapi_url=place, title=f"{app.title} - Swagger UI")

    async def redoc(_: Request) -> HTMLResponse:
        return get_redoc_html(openapi_url=place, title=f"{app.title} - ReDoc")

    app.add_route("/docs", swagger, include_in_schema=False)
    app.add_route("/redoc", redoc, include_in_schema=False)


def operations_of(document: Json) -> Iterator[tuple[tuple[str, str], Json]]:
    """All operations of a document, keyed by (method in lower case, path)."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield (method, path), operation


def _finish(document: Json) -> None:
    schemas = document["components"]["schemas"]
    for unused in (_VALIDATION, "ValidationError"):
        del schemas[unused]
    for _, operation in operations_of(document):
        responses = operation["responses"]
        for status, response in list(responses.items()):
            for content in response.get("content", {}).values():
                if content["schema"].get("$ref", "").endswith(f"/{_VALIDATION}"):
                    del responses[status]
        for described in (operation.get("requestBody", {}), *responses.values()):
            for content in described.get("content", {}).values():
                for name, shared in content["schema"].pop("$defs", {}).items():
                    schemas.setdefault(name, shared)


def _secure(document: Json, unkeyed: Collection[tuple[str, str]]) -> None:
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for (method, path), operation in operations_of(document):
        if (method.upper(), path) in unkeyed:
            operation["security"] = []
        else:
            operation["security"] = [{"bearer": []}, {"header": []}]
