"""Changes in FastAPI's document what routes can't say: shared schemas of events, API keys, and that
a wrong field is no 422."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fastapi import FastAPI

from quickchange_server.api.auth import METRICS_PATH, OPEN
from quickchange_server.config import Settings
from quickchange_server.frontend.request_base import Json

_VALIDATION = "HTTPValidationError"  # FastAPI's own body of a wrong field, which no route answers


def install(app: FastAPI, settings: Settings, *, keyed: bool) -> None:
    """Have /openapi.json and /docs show the whole document. keyed: API keys are asked for."""
    unkeyed = OPEN | {("GET", METRICS_PATH)} if settings.open_metrics else OPEN
    made = app.openapi

    def whole() -> Json:
        if app.openapi_schema is None:
            document = made()
            _finish(document)
            if keyed:
                _secure(document, unkeyed)
        return made()

    app.openapi = whole  # type: ignore[method-assign]  # as FastAPI's documentation has it


def operations_of(document: Json) -> Iterator[tuple[tuple[str, str], Json]]:
    """Every operation, by method in lower case and path."""
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
            for content in response["content"].values():
                schema = content["schema"]
                if schema.get("$ref", "").endswith(f"/{_VALIDATION}"):
                    del responses[status]
                for name, shared in schema.pop("$defs", {}).items():
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
