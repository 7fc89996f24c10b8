"""Makes FastAPI's document whole: answers, errors, API keys, and bodies that it can't see.

Routes write their answers and read some bodies themselves, so that FastAPI knows only their paths,
parameters and the bodies that it parses. `operations.py` has the rest, by operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import TypeAdapter

from quickchange_server.api.admin.adapters import AddFromPath
from quickchange_server.api.auth import METRICS_PATH, OPEN
from quickchange_server.api.openai.responses import Json
from quickchange_server.api.openapi.operations import EVENTS, JSON, MEANINGS, OPERATIONS, Answers
from quickchange_server.config import Settings

_REF = "#/components/schemas/{model}"
_OF_422 = ("HTTPValidationError", "ValidationError")  # FastAPI's; errors have other bodies here
_UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "medusa_lm_head.safetensors",
    "turbo_heads.safetensors",
)


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
    tables = (o for told in OPERATIONS.values() for o in (told.model, told.event, told.error))
    models = {id(model): model for model in (*tables, AddFromPath) if model is not None}
    schemas, shared = _schemas(list(models.values()))
    own = document["components"]["schemas"]
    for unused in _OF_422:
        own.pop(unused, None)
    for name in own.keys() & shared.keys():
        if own[name]["properties"].keys() != shared[name]["properties"].keys():
            raise ValueError(f"two models are named {name}: rename the one of the answers")
    document["components"]["schemas"] = shared | own
    for place, operation in operations_of(document):
        operation["responses"] = _responses(OPERATIONS[place], schemas)
    upload = document["paths"].get("/v1/adapters", {}).get("post")
    if upload is not None:
        upload["requestBody"] = _upload(schemas[id(AddFromPath)])


def _schemas(models: list[Any]) -> tuple[dict[int, Json], Json]:
    """Each model's schema by its id, and those that they share, by name."""
    mode: Literal["validation"] = "validation"
    inputs = [(id(model), mode, TypeAdapter(model)) for model in models]
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
    elif told.event is None:
        content[told.content] = {"schema": {"type": "string"}}
    if told.event is not None:
        content[EVENTS] = {"schema": _event(schemas[id(told.event)], told.last_event)}
    return {"description": MEANINGS[told.status], "content": content}


def _event(data: Json, last: str | None) -> Json:
    """The schema of one server-sent event: OpenAPI 3.1 has none for the stream."""
    shown: Json = {"type": "string", "contentMediaType": JSON, "contentSchema": data}
    if last is not None:
        shown = {"anyOf": [shown, {"const": last}]}
    return {"type": "object", "properties": {"data": shown}, "required": ["data"]}


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
