"""Usage for billing: GET /v1/usage."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, cast

from fastapi import APIRouter, Query

from quickchange_server.adapter_registry.resolver import BASE_LABEL, COMPOSITION_LABEL
from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import Calling
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import UsageReport
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS
from quickchange_server.errors import ForbiddenError, InvalidRequestError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Json
from quickchange_server.tenants.key import check_tenant
from quickchange_server.tenants.usage_log import FIGURES, GROUPS, HOUR, Group, UsageQuery, report

DEFAULT_SECONDS = 30 * 86_400  # default period before `to`
NO_NAMES = {BASE_LABEL, COMPOSITION_LABEL}
UNSEEN = "-"  # stands for hidden adapters; no adapter's name begins so
DEFAULT_GROUP = "tenant,key,adapter"

router = APIRouter(route_class=JsonRoute, tags=["API keys"], responses=COMMON_ERRORS)


@router.get("/v1/usage", response_model=UsageReport, response_model_exclude_unset=True)
async def usage(
    services: Injected,
    caller: Calling,
    begin: Annotated[str | None, Query(alias="from")] = None,
    end: Annotated[str | None, Query(alias="to")] = None,
    tenant: str | None = None,
    group: str = DEFAULT_GROUP,
) -> Json:
    """Requests and tokens by whole hours, for the caller's tenant or, with the scope admin, all.

    `from` and `to` are Unix seconds or ISO 8601 times; hours that they cut are counted whole.
    """
    until = -(-_seconds(end, "to", time.time()) // HOUR) * HOUR
    since = _seconds(begin, "from", until - DEFAULT_SECONDS) // HOUR * HOUR
    wanted = UsageQuery(since, until, _tenant(caller, tenant), _groups(group))
    rows = await services.database.read(partial(report, wanted=wanted))
    return {
        "object": "list",
        "from": since,
        "to": until,
        "group": list(wanted.group),
        "data": rows if caller.may("admin") else _veiled(rows, caller),
    }


def _veiled(rows: list[Json], caller: Caller) -> list[Json]:
    """The rows with all adapters that the caller can't see summed into one, `UNSEEN`.

    Other keys of its tenant, or an experiment's variants, may have used those.
    """
    kept: dict[tuple[object, ...], Json] = {}
    for row in rows:
        name = row.get("adapter")
        if name is not None and name not in NO_NAMES and not caller.sees(name):
            row = {**row, "adapter": UNSEEN}
        same = kept.setdefault(tuple(row[name] for name in row if name not in FIGURES), row)
        if same is not row:
            same |= {figure: same[figure] + row[figure] for figure in FIGURES}
    return list(kept.values())


def _tenant(caller: Caller, asked: str | None) -> str | None:
    """The tenant whose usage is reported; None: all tenants."""
    if asked is not None:
        check_tenant(asked)
    if caller.may("admin"):
        return asked
    if asked not in (None, caller.tenant):
        raise ForbiddenError(
            "tenant: an API key without the scope admin sees its own tenant's usage only; leave "
            "tenant out",
            param="tenant",
        )
    return caller.tenant


def _seconds(text: str | None, param: str, default: float) -> int:
    if text is None:
        return int(default)
    try:
        if text.isascii() and text.isdecimal() and len(text) <= 11:
            return int(text)
        time = datetime.fromisoformat(text)
        return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(
            f"{param}: must be Unix seconds or an ISO 8601 time such as 2026-01-31T12:00:00Z",
            param=param,
        ) from error


def _groups(text: str) -> tuple[Group, ...]:
    names = [name for name in text.split(",") if name]
    if any(name not in GROUPS for name in names):
        raise InvalidRequestError(
            f"group: must be some of {', '.join(GROUPS)}, joined by commas", param="group"
        )
    return tuple(cast(Group, name) for name in dict.fromkeys(names))
