"""Adding of adapters over HTTP: from a folder or a URL, as an upload, as a sum of others."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from quickchange_server.adapter_registry.adapter_places import allowed_place
from quickchange_server.api.admin.adapters import adapters_on, check_seen, uses_hidden
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import MANAGE, Managing, check_own
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import AddedAdapter
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors, parsed_body
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import (
    MAX_COMPONENTS,
    MAX_PATH,
    Body,
    Json,
    MergeWeight,
    Name,
    WeightedAdapter,
)
from quickchange_store.combining.composing import GivenTerm
from quickchange_store.formats.rank_limits import EXACT_ONLY, MAX_RANK, RankLimits
from quickchange_store.importing import Added

UPLOADS = "/v1/adapters"
MAX_UPLOAD_FILES = 64  # Turbo heads may come in several
UPLOAD_FILE = re.compile(r"(?!\.+$)[\w. ()+-]{1,100}")
KEPT = (".json", ".safetensors")
MAX_SCALES = 1_000  # factors of a term's modules

Checked = TypeVar("Checked", bound=Body)

router = APIRouter(
    route_class=JsonRoute,
    tags=["adapters"],
    dependencies=[Depends(MANAGE), Depends(adapters_on)],
    responses=COMMON_ERRORS,
)


class _Ranks(Body):
    """Limits of the ranks by which updates are served that no LoRA made."""

    exact_rank: int = Field(EXACT_ONLY.exact, ge=1, le=MAX_RANK)  # up to which they are exact
    approximate_rank: int | None = Field(None, ge=1, le=MAX_RANK)  # default: exactly, or refused

    @property
    def limits(self) -> RankLimits:
        return RankLimits(self.exact_rank, self.approximate_rank)


class AddFromPath(_Ranks):
    name: Name
    path: str = Field(max_length=MAX_PATH)  # a folder of the server's machine, or a URL


class _UploadFields(_Ranks):
    name: Name


class ComposedTerm(WeightedAdapter):
    """A term of a composition under a name."""

    scales: dict[str, MergeWeight] = Field(default_factory=dict, max_length=MAX_SCALES)


class Compose(Body):
    name: Name
    adapters: list[ComposedTerm] = Field(min_length=1, max_length=MAX_COMPONENTS, fail_fast=True)


_FILE = {"type": "string", "format": "binary"}
_RANK = {"type": "integer", "minimum": 1, "maximum": MAX_RANK}
_UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "medusa_lm_head.safetensors",
    "turbo_heads.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_UPLOAD_FORM = {
    "type": "object",
    "description": "Each file in a field of its name; docs/http.md says which belong together",
    "properties": {
        **{"name": {"type": "string"}, "exact_rank": _RANK, "approximate_rank": _RANK},
        **dict.fromkeys(_UPLOADED, _FILE),
    },
    "required": ["name"],
}
_ADD_BODY = {  # for the OpenAPI document; the route parses the body itself
    "required": True,
    "content": {
        "application/json": {"schema": parsed_body(AddFromPath | Compose)},
        "multipart/form-data": {"schema": _UPLOAD_FORM},
    },
}


@router.post(
    UPLOADS,
    status_code=201,
    response_model=AddedAdapter,
    responses=errors(409, 413),
    openapi_extra={"requestBody": _ADD_BODY},
)
async def add_adapter(request: Request, services: Injected, caller: Managing) -> Json:
    """Add an adapter from a folder of the server's machine or a URL, a sum of adapters (both JSON),
    or an upload (multipart)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        content = _read(await request.body())
        if isinstance(content, dict) and "adapters" in content:
            return _added(await _compose(services, caller, _checked(Compose, content)))
        body = _checked(AddFromPath, content)
        check_own(caller, body.name, "name")
        place = allowed_place(services.settings, body.path, "path")
        with uses_hidden(caller):
            return _added(await services.imports.add(body.name, place, body.limits))
    if kind == "multipart/form-data":
        fields = len(_UploadFields.model_fields)
        async with request.form(max_files=MAX_UPLOAD_FILES, max_fields=fields) as form:
            return _added(await _add_upload(services, caller, form))
    raise InvalidRequestError(
        "the body must be application/json with name and path or adapters, or multipart/form-data "
        "with name and the adapter's files"
    )


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _checked(model: type[Checked], content: Any, *, strings: bool = False) -> Checked:
    try:
        return (
            model.model_validate_strings(content, strict=False)
            if strings
            else model.model_validate(content)
        )
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _compose(services: Services, caller: Caller, body: Compose) -> Added:
    check_own(caller, body.name, "name")
    for term in body.adapters:
        check_seen(services, caller, term.id)
    terms = [GivenTerm(t.id, t.weight, t.begin, t.end, t.scales) for t in body.adapters]
    with uses_hidden(caller):
        return await services.imports.compose(body.name, terms)


async def _add_upload(services: Services, caller: Caller, form: FormData) -> Added:
    given = {k: v for k, v in form.items() if k in _UploadFields.model_fields}
    fields = _checked(_UploadFields, given, strings=True)
    name = fields.name
    check_own(caller, name, "name")
    with (
        uses_hidden(caller),
        tempfile.TemporaryDirectory(prefix="quickchange-upload-") as folder,
    ):
        for file, upload in form.multi_items():
            if file in given:
                continue
            # The field's name, not the client's file name: UPLOAD_FILE admits no path.
            path = Path(folder) / file
            fits = UPLOAD_FILE.fullmatch(file) is not None and not path.exists()
            if not fits or not isinstance(upload, UploadFile):
                raise InvalidRequestError(
                    f"{file}: can't be taken; send the adapter's files, each once, as a file field "
                    "that has its name",
                    param=file,
                )
            await asyncio.to_thread(_write, upload, path)
        return await services.imports.add(name, Path(folder), fields.limits)


def _write(upload: UploadFile, path: Path) -> None:
    """Write a file of the adapter. Of any other, such as README.md, only its name is of use: a
    pickle's, to say how to convert it."""
    with path.open("xb") as target:
        if path.suffix in KEPT:
            shutil.copyfileobj(upload.file, target)


def _added(added: Added) -> Json:
    version = added.version
    return {
        "id": version.name,
        "object": "adapter",
        "version": version.number,
        "digest": version.digest,
        "created": int(version.created),
        "warnings": list(added.warnings),
    }
