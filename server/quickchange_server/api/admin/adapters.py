"""Administration of adapters, their versions and aliases: /v1/adapters and /v1/aliases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from quickchange_server.adapter_registry.visibility import reachable, seen
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import MANAGE, Managing, check_own
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import (
    AdapterDocument,
    AdapterList,
    AliasDocument,
    AliasList,
    RemovedAdapter,
    RemovedAlias,
    ServedAdapter,
    VersionResidency,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.errors import ConflictError, ForbiddenError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import (
    Body,
    Json,
    Name,
)
from quickchange_store.errors import AdapterNotFoundError, InUseError
from quickchange_store.index import Alias, Index, Version
from quickchange_store.info import AdapterInfo
from quickchange_store.names import Reference, did_you_mean, parse_reference
from quickchange_store.store import Resolved

ACCEPTED = "Asked of the engine; the answer does not wait for it"


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


# --- removing -----------------------------------------------------------------------------------


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
