"""Makes FastAPI's document whole: answers, errors, API keys, and bodies that it can't see.

Routes write their answers and read some bodies themselves, so that FastAPI knows only their paths,
parameters and the bodies that it parses. `operations.py` has the rest, by operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from quickchange_server.api.adapters import AddFromPath
from quickchange_server.api.openapi.operations import EVENTS, JSON, MEANINGS, OPERATIONS, Answers
from quickchange_server.api.shapes import Json

_REF = "#/components/schemas/{model}"
_EVENTS = {
    "type": "string",
    "description": "Server-sent events, each `data: ` and JSON; docs/http.md has their form",
}
_UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "medusa_lm_head.safetensors",
    "turbo_heads.safetensors",
)


def install(app: FastAPI, *, keyed: bool, open_operations: Collection[tuple[str, str]]) -> None:
    """Have /openapi.json and /docs show the whole document.

    keyed: the server asks for API keys, but at `open_operations` (method in capitals, path).
    """
    made = app.openapi

    def whole() -> Json:
        if app.openapi_schema is None:
            document = made()
            _finish(document)
            if keyed:
                _secure(document, open_operations)
        return made()

    app.openapi = whole  # type: ignore[method-assign]  # as FastAPI's documentation has it


def operations_of(document: Json) -> Iterator[tuple[tuple[str, str], Json]]:
    """Every operation, by method in lower case and path."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield (method, path), operation


def _finish(document: Json) -> None:
    models = {id(m): m for told in OPERATIONS.values() for m in (told.model, told.error)}
    models[id(AddFromPath)] = AddFromPath
    schemas, shared = _schemas([model for model in models.values() if model is not None])
    document["components"]["schemas"] |= shared
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    for place, operation in operations_of(document):
        operation["responses"] = _responses(OPERATIONS[place], schemas)
    upload = document["paths"].get("/v1/adapters", {}).get("post")
    if upload is not None:
        upload["requestBody"] = _upload(schemas[id(AddFromPath)])


def _schemas(models: list[Any]) -> tuple[dict[int, Json], Json]:
    """Each model's schema by its id, and those that they share, by name."""
    inputs = [(id(model), "validation", TypeAdapter(model)) for model in models]
    found, shared = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    return {key: schema for (key, _), schema in found.items()}, shared.get("$defs", {})


def _responses(told: Answers, schemas: Mapping[int, Json]) -> Json:
    responses = {}
    if told.status:
        responses[str(told.status)] = _success(told, schemas)
    if not told.errors:  # the server's state: the same body, whatever it is
        responses["503"] = _success(told, schemas) | {"description": "No requests are taken"}
    for status in sorted(told.errors):
        error = {"schema": schemas[id(told.error)]}
        responses[str(status)] = {"description": MEANINGS[status], "content": {JSON: error}}
    return responses


def _success(told: Answers, schemas: Mapping[int, Json]) -> Json:
    content: Json = {}
    if told.model is not None:
        content[told.content] = {"schema": schemas[id(told.model)]}
    elif not told.streams:
        content[told.content] = {"schema": {"type": "string"}}
    if told.streams:
        content[EVENTS] = {"schema": _EVENTS}
    return {"description": MEANINGS[told.status], "content": content}


def _upload(from_path: Json) -> Json:
    """The two bodies of POST /v1/adapters, which the route reads itself."""
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "description": "Each file in a field of its name; docs/http.md says which belong together",
        "properties": {"name": {"type": "string"}, **dict.fromkeys(_UPLOADED, file)},
        "required": ["name"],
    }
    return {
        "required": True,
        "content": {JSON: {"schema": from_path}, "multipart/form-data": {"schema": form}},
    }


def _secure(document: Json, open_operations: Collection[tuple[str, str]]) -> None:
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for (method, path), operation in operations_of(document):
        if (method.upper(), path) in open_operations:
            operation["security"] = []
        else:
            operation["security"] = [{"bearer": []}, {"header": []}]
