"""Administration of adapters, their versions and aliases: /v1/adapters and /v1/aliases."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from quickchange_server.adapter_registry.adapter_places import allowed_place
from quickchange_server.adapter_registry.visibility import reachable, seen
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import MANAGE, Managing, check_own
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import (
    AdapterDocument,
    AdapterList,
    AddedAdapter,
    AliasDocument,
    AliasList,
    RemovedAdapter,
    RemovedAlias,
    ServedAdapter,
    VersionResidency,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors, parsed_body
from quickchange_server.errors import ConflictError, ForbiddenError, InvalidRequestError
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
from quickchange_store.errors import AdapterNotFoundError, InUseError
from quickchange_store.formats.rank_limits import EXACT_ONLY, MAX_RANK, RankLimits
from quickchange_store.importing import Added
from quickchange_store.index import Alias, Index, Version
from quickchange_store.info import AdapterInfo
from quickchange_store.names import Reference, did_you_mean, parse_reference
from quickchange_store.store import Resolved

UPLOADS = "/v1/adapters"
MAX_UPLOAD_FILES = 64  # Turbo heads may come in several
ACCEPTED = "Asked of the engine; the answer does not wait for it"
UPLOAD_FILE = re.compile(r"(?!\.+$)[\w. ()+-]{1,100}")
KEPT = (".json", ".safetensors")
MAX_SCALES = 1_000  # factors of a term's modules

Checked = TypeVar("Checked", bound=Body)


async def adapters_on(services: Injected) -> None:
    """Raise ForbiddenError if the server serves no adapters."""
    if not services.settings.adapters:
        raise ForbiddenError(
            "adapters are switched off by the setting adapters (QUICKCHANGE_ADAPTERS)"
        )


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
_UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "medusa_lm_head.safetensors",
    "turbo_heads.safetensors",
)
_UPLOAD_FORM = {
    "type": "object",
    "description": "Each file in a field of its name; docs/http.md says which belong together",
    "properties": {"name": {"type": "string"}, **dict.fromkeys(_UPLOADED, _FILE)},
    "required": ["name"],
}
_ADD_BODY = {  # for the OpenAPI document; the route parses the body itself
    "required": True,
    "content": {
        "application/json": {"schema": parsed_body(AddFromPath | Compose)},
        "multipart/form-data": {"schema": _UPLOAD_FORM},
    },
}


class Rollback(Body):
    version: int | None = Field(None, ge=1, lt=2**63)  # default: the version before the current one


class PrefetchTo(Body):
    tier: Literal["device", "host"] = "device"


class PointAlias(Body):
    target: Name  # NAME, or NAME@VERSION
    turbo: Name | None = None  # the same form, for the drafting heads; default: the target's


# --- visibility ---------------------------------------------------------------------------------


def check_seen(services: Services, caller: Caller, reference: str) -> None:
    """Raise AdapterNotFoundError, the same for a missing name and for one the caller can't see."""
    parsed = parse_reference(reference)
    index = services.store.snapshot()
    try:
        reachable(index, parsed, caller.sees).find(parsed)
    except AdapterNotFoundError as error:
        there = seen(index, caller.sees)
        near = did_you_mean(parsed.name, (*there.entries, *there.aliases))
        if not near or parsed.name in (*there.entries, *there.aliases):  # it lacks the version
            raise
        remedy = f"{near} GET /v1/adapters lists what there is"
        raise AdapterNotFoundError(error.problem, key=error.key, remedy=remedy) from error


@contextmanager
def uses_hidden(caller: Caller) -> Iterator[None]:
    """Replace InUseError by one without alias names for callers who may not see all of them."""
    try:
        yield
    except InUseError as error:
        if "*" in caller.names:
            raise
        raise ConflictError(
            "it is in use: an alias points at it or drafts with it, or it is the version that its "
            "name serves; change that first, or ask an administrator where you see no such alias"
        ) from error


# --- views --------------------------------------------------------------------------------------


def _residency(services: Services, digests: Sequence[str]) -> Json:
    """Where the farthest of the versions lies that a name serves, and what all of them take."""
    residency = services.client.residency
    found = [residency.get(digest) for digest in digests]
    tiers = ["disk" if each is None else each.tier for each in found]
    farthest = max(tiers, key=("device", "host", "disk").index)
    told: Json = {
        "tier": farthest,
        "bytes": sum(each.bytes for each in found if each is not None),
        "pinned": set(digests) <= set(residency.pins),
    }
    if services.cluster is not None:
        told["replicas"] = services.cluster.tiers(digests[tiers.index(farthest)])
    return told


def _version(services: Services, version: Version) -> Json:
    return {
        "version": version.number,
        "digest": version.digest,
        "created": int(version.created),
        "turbo": _turbo(services.catalog.info(version.digest)) if version.turbo else None,
        "residency": _residency(services, version.served),
    }


def _turbo(info: AdapterInfo) -> Json | None:
    """Statistics of a version's Turbo heads; None without heads."""
    heads, vocabulary = info.turbo, info.base_vocabulary
    if heads is None:
        return None
    medusa = None if vocabulary is None else heads.medusa_parameters(vocabulary)
    return {
        "depth": heads.depth,
        "sequential": heads.sequential,
        "vocabulary": heads.vocabulary,
        "own_outputs": heads.own_outputs,
        "parameters": heads.parameters,
        "medusa_1_ratio": None if medusa is None else round(medusa / heads.parameters, 1),
    }


def _summary(services: Services, index: Index, name: str) -> Json:
    """An adapter's name with the version that it serves."""
    entry = index.entry(name)
    aliases = sorted(alias for alias, target in index.aliases.items() if target.name == name)
    return {
        "id": name,
        "object": "adapter",
        **_version(services, entry.versions[entry.current]),
        "versions": sorted(entry.versions),
        "aliases": aliases,
    }


def _state(services: Services, resolved: Resolved) -> Json:
    return {
        "id": resolved.name,
        "version": resolved.version,
        "digest": resolved.digest,
        "residency": _residency(services, resolved.served),
    }


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


# --- reading ------------------------------------------------------------------------------------


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(services: Injected, caller: Managing) -> Json:
    """List all adapters, each with the version that it serves and that version's residency."""
    index = seen(services.store.snapshot(), caller.sees)
    return {
        "object": "list",
        "data": [_summary(services, index, name) for name in sorted(index.entries)],
    }


@router.get("/v1/adapters/{reference:path}", response_model=AdapterDocument, responses=errors(404))
async def one_adapter(reference: str, services: Injected, caller: Managing) -> Json:
    """One adapter by name, version or alias: its versions, and details of the one referred to."""
    check_seen(services, caller, reference)
    resolved = services.store.resolve(reference)
    index = seen(services.store.snapshot(), caller.sees)
    info = await asyncio.to_thread(services.store.info, resolved.digest)
    details = {k: v for k, v in asdict(info).items() if k not in ("digest", "created", "turbo")}
    return {
        **_summary(services, index, resolved.name),
        **_state(services, resolved),
        "turbo": _turbo(info),
        "current": index.entry(resolved.name).current,
        "versions": [_version(services, v) for v in services.store.versions(resolved.name)],
        "info": details,
    }


# --- adding and removing ------------------------------------------------------------------------


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


async def remove_reference(
    services: Services, caller: Caller, reference: str
) -> tuple[Version, ...]:
    """Remove a name or one version from the store, and from the engine if nothing else uses it."""
    check_seen(services, caller, reference)
    with uses_hidden(caller):
        gone = await asyncio.to_thread(services.store.remove, reference)
    used = {digest for version in gone for digest in version.served}
    for digest in used - services.store.snapshot().digests():
        services.client.forget(digest)
    await services.recorder.sweep()
    return gone


@router.delete(
    "/v1/adapters/{reference:path}", response_model=RemovedAdapter, responses=errors(404, 409)
)
async def remove_adapter(reference: str, services: Injected, caller: Managing) -> Json:
    """Remove a name with all its versions, or one version. Running requests keep theirs."""
    gone = await remove_reference(services, caller, reference)
    return {
        "id": reference,
        "object": "adapter.deleted",
        "deleted": True,
        "versions": [str(version) for version in gone],
    }


# --- versions and residency ---------------------------------------------------------------------


@router.post(
    "/v1/adapters/{name:path}/rollback",
    response_model=ServedAdapter,
    responses=errors(404, 409, 413),
)
async def rollback(
    name: str, services: Injected, caller: Managing, body: Rollback | None = None
) -> Json:
    """Serve the version before the current one, or a given one, under the name."""
    check_seen(services, caller, name)
    version = None if body is None else body.version
    with uses_hidden(caller):
        served = await asyncio.to_thread(services.store.rollback, name, version)
    return {"id": name, "object": "adapter", **_version(services, served)}


@router.post(
    "/v1/adapters/{reference:path}/pin",
    status_code=202,
    response_model=VersionResidency,
    response_description=ACCEPTED,
    responses=errors(404),
)
async def pin(reference: str, services: Injected, caller: Managing) -> Json:
    """Load a version to the device and keep it there."""
    return _pinned(services, caller, reference, True)


@router.post(
    "/v1/adapters/{reference:path}/unpin",
    status_code=202,
    response_model=VersionResidency,
    response_description=ACCEPTED,
    responses=errors(404),
)
async def unpin(reference: str, services: Injected, caller: Managing) -> Json:
    """Allow a version to be evicted again."""
    return _pinned(services, caller, reference, False)


def _pinned(services: Services, caller: Caller, reference: str, pinned: bool) -> Json:
    check_seen(services, caller, reference)
    resolved = services.store.resolve(reference)
    for digest in resolved.served:
        services.client.pin(digest, pinned)
    return _state(services, resolved)


@router.post(
    "/v1/adapters/{reference:path}/prefetch",
    status_code=202,
    response_model=VersionResidency,
    response_description=ACCEPTED,
    responses=errors(404, 413),
)
async def prefetch(
    reference: str, services: Injected, caller: Managing, body: PrefetchTo | None = None
) -> Json:
    """Load a version to a tier if the tier's budget allows; the answer does not wait for it."""
    check_seen(services, caller, reference)
    resolved = services.store.resolve(reference)
    for digest in resolved.served:
        services.client.prefetch(digest, "device" if body is None else body.tier)
    return _state(services, resolved)


# --- aliases ------------------------------------------------------------------------------------


@router.get("/v1/aliases", response_model=AliasList)
async def list_aliases(services: Injected, caller: Managing) -> Json:
    """List all aliases and what they point at."""
    aliases = seen(services.store.snapshot(), caller.sees).aliases
    return {
        "object": "list",
        "data": [_alias(alias, target) for alias, target in sorted(aliases.items())],
    }


@router.put(
    "/v1/aliases/{alias:path}", response_model=AliasDocument, responses=errors(404, 409, 413)
)
async def point_alias(alias: str, body: PointAlias, services: Injected, caller: Managing) -> Json:
    """Point an alias at a name (whichever version it serves) or at one version, atomically.

    `turbo` names the adapter whose heads draft for the alias; default: the target's own.
    """
    check_own(caller, alias, "alias")
    services.imports.refuse_taken(alias)
    for reference in (body.target, body.turbo):
        if reference is not None:
            check_seen(services, caller, reference)
    target = await asyncio.to_thread(services.store.alias, alias, body.target, body.turbo)
    return _alias(alias, target)


@router.delete("/v1/aliases/{alias:path}", response_model=RemovedAlias, responses=errors(404, 409))
async def remove_alias(alias: str, services: Injected, caller: Managing) -> Json:
    """Remove an alias; what it points at stays."""
    index = services.store.snapshot()
    if alias not in reachable(index, Reference(alias), caller.sees).aliases:
        near = did_you_mean(alias, seen(index, caller.sees).aliases)
        remedy = f"{near} GET /v1/aliases lists all".lstrip()
        raise AdapterNotFoundError("no such alias", key=alias, remedy=remedy)
    await asyncio.to_thread(services.store.unalias, alias)
    return {"id": alias, "object": "alias.deleted", "deleted": True}


def _alias(alias: str, target: Alias) -> Json:
    return {"id": alias, "object": "alias", "target": str(target), "turbo": target.turbo}
