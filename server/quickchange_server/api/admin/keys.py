"""Administration of API keys, /v1/keys, for callers with the scope admin."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, ClassVar

from fastapi import APIRouter, Depends, Path
from pydantic import Field

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import ADMIN
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import (
    ApiKeyDocument,
    ApiKeyList,
    ApiKeyWithSecret,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.frontend.caller import Scope
from quickchange_server.frontend.request_base import Body, Json, Number
from quickchange_server.tenants import key_records
from quickchange_server.tenants.key import MAX_GLOBS, MAX_LIMIT, Key, Limits, Terms, names_of

MAX_LABEL = 200  # characters
MAX_OVERLAP = 30 * 86_400.0  # seconds
DEFAULT_OVERLAP = 86_400.0

router = APIRouter(
    route_class=JsonRoute, tags=["API keys"], dependencies=[Depends(ADMIN)], responses=COMMON_ERRORS
)

Count = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
Globs = Annotated[list[str], Field(max_length=MAX_GLOBS, fail_fast=True)]
Label = Annotated[str, Field(max_length=MAX_LABEL)]
KeyId = Annotated[str, Path(alias="id")]
Time = Annotated[Number, Field(ge=0, le=1e11)]  # Unix seconds


class KeyLimits(Body):
    """Limits of a key; `null` is no limit."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_requests: Count | None = None
    max_prompt_tokens: Count | None = None
    max_new_tokens: Count | None = None

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class NewKey(Body):
    tenant: str
    scope: Scope = "infer"
    label: Label = ""
    names: Globs | None = None  # globs; required except for the scope admin
    limits: KeyLimits = KeyLimits()
    expires: Time | None = None  # Unix seconds; default: never


class ChangedKey(Body):
    """Changes of a key; given fields replace the old, `null` removes an expiry or all limits."""

    null_is_default: ClassVar[bool] = False

    scope: Scope = "infer"
    label: Label = ""
    names: Globs = Field(default=[])
    limits: KeyLimits | None = None
    expires: Time | None = None

    def terms(self, old: Terms) -> Terms:
        """The key's old terms with these changes applied."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        if "names" in given:
            given["names"] = tuple(self.names)
        if "limits" in given:
            given["limits"] = Limits() if self.limits is None else self.limits.limits()
        return replace(old, **given)


class Rotation(Body):
    overlap_seconds: Number = Field(DEFAULT_OVERLAP, ge=0, le=MAX_OVERLAP)


def _key(key: Key) -> Json:
    terms, now = key.terms, time.time()
    retiring = key.retiring
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": terms.tenant,
        "scope": terms.scope,
        "label": terms.label,
        "names": list(terms.names),
        "limits": asdict(terms.limits),
        "state": key.state(now),
        "created": key.created,
        "expires": terms.expires,
        "revoked": key.revoked,
        "old_secret_until": None if retiring is None or retiring.until <= now else retiring.until,
    }


@router.post("/v1/keys", status_code=201, response_model=ApiKeyWithSecret, responses=errors(413))
async def create_key(body: NewKey, services: Injected) -> Json:
    """Create an API key. Its secret is in this answer and nowhere else."""
    terms = Terms(
        tenant=body.tenant,
        scope=body.scope,
        label=body.label,
        names=names_of(body.scope, body.names),
        limits=body.limits.limits(),
        expires=body.expires,
    )
    key, secret = await services.database.write(
        partial(key_records.create, terms=terms, now=time.time())
    )
    await services.revisions.take_up()
    return {**_key(key), "secret": secret}


@router.get("/v1/keys", response_model=ApiKeyList)
async def list_keys(services: Injected, tenant: str | None = None) -> Json:
    """List all keys, or a tenant's, oldest first, including revoked and expired ones."""
    keys = await services.database.read(key_records.every)
    shown = [_key(key) for key in keys if tenant is None or key.terms.tenant == tenant]
    return {"object": "list", "data": shown}


@router.get("/v1/keys/{id}", response_model=ApiKeyDocument, responses=errors(404))
async def one_key(key_id: KeyId, services: Injected) -> Json:
    """One key."""
    return _key(await services.database.read(partial(key_records.one, key_id=key_id)))


@router.patch("/v1/keys/{id}", response_model=ApiKeyDocument, responses=errors(404, 409, 413))
async def change_key(key_id: KeyId, body: ChangedKey, services: Injected) -> Json:
    """Change a key's terms; its tenant stays."""
    key = await services.database.write(
        partial(key_records.change, key_id=key_id, changed=body.terms)
    )
    await services.revisions.take_up()
    return _key(key)


@router.delete("/v1/keys/{id}", response_model=ApiKeyDocument, responses=errors(404))
async def revoke_key(key_id: KeyId, services: Injected) -> Json:
    """Revoke a key for good; its past usage stays."""
    key = await services.database.write(partial(key_records.revoke, key_id=key_id, now=time.time()))
    await services.revisions.take_up()
    return _key(key)


@router.post(
    "/v1/keys/{id}/rotate", response_model=ApiKeyWithSecret, responses=errors(404, 409, 413)
)
async def rotate_key(key_id: KeyId, services: Injected, body: Rotation | None = None) -> Json:
    """Give a key a new secret, in this answer and nowhere else; the old one ends later."""
    overlap = DEFAULT_OVERLAP if body is None else body.overlap_seconds
    key, secret = await services.database.write(
        partial(key_records.rotate, key_id=key_id, overlap=overlap, now=time.time())
    )
    await services.revisions.take_up()
    return {**_key(key), "secret": secret}
