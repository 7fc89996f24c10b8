"""Usage for billing: requests and tokens by hour, tenant, key and adapter. Durable and exact.

Each process keeps the totals of its own rows and writes them whole, so that a write that is
repeated, or lost and followed by the next, leaves the right figure. Tokens are those that the
responses say; a request that failed is counted as failed, and its tokens are not billed.
"""

from __future__ import annotations

import secrets
from asyncio import Future
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import Connection, func, select

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.request_observers import Completed
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables import insert
from quickchange_server.storage.tables_tenants import USAGE

HOUR = 3600  # seconds
MAX_ROWS = 10_000  # of one report

Group = Literal["hour", "tenant", "key", "adapter"]
GROUPS: tuple[Group, ...] = get_args(Group)
FIGURES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed")


@dataclass(frozen=True, slots=True)
class _Place:
    """What a row is about."""

    hour: int
    tenant: str
    key: str
    adapter: str


@dataclass(slots=True)
class _Totals:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0

    def add(self, completed: Completed) -> None:
        self.requests += 1
        if completed.ending == "failed":
            self.failed += 1
            return
        self.prompt_tokens += completed.opened.prompt_tokens
        self.cached_tokens += completed.cached_tokens
        self.completion_tokens += completed.completion_tokens


@dataclass
class UsageLog:
    """This process' rows of the current hour. On the event loop alone."""

    database: Database
    process: str = field(default_factory=lambda: secrets.token_hex(8))
    _hour: int = 0
    _totals: dict[_Place, _Totals] = field(default_factory=dict)

    def add(self, completed: Completed, key: str, now: float) -> Future[None]:
        """Count a request that ended at `now`, Unix seconds; done when it can't be lost."""
        hour = int(now) // HOUR * HOUR
        if hour > self._hour:  # a clock that is set back must not begin an hour's totals anew
            self._hour = hour
            self._totals.clear()
        opened = completed.opened
        place = _Place(self._hour, opened.caller.tenant, key, opened.label)
        totals = self._totals.setdefault(place, _Totals())
        totals.add(completed)
        row = {**asdict(place), "process": self.process, **asdict(totals)}
        return self.database.record(lambda connection: _write(connection, row))


def _write(connection: Connection, row: dict[str, Any]) -> None:
    statement = insert(connection, USAGE).values(row)
    changed = {name: statement.excluded[name] for name in FIGURES}
    identity = [column.name for column in USAGE.primary_key]
    connection.execute(statement.on_conflict_do_update(index_elements=identity, set_=changed))


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What a report is asked for."""

    begin: int  # hours' first seconds: from `begin` to before `end`
    end: int
    tenant: str | None  # None: all
    group: Sequence[Group]


def report(connection: Connection, wanted: UsageQuery) -> list[dict[str, Any]]:
    """Rows with the group's columns and FIGURES. Raises InvalidRequestError where they are too
    many."""
    columns = [USAGE.c[name] for name in wanted.group]
    sums = [func.coalesce(func.sum(USAGE.c[name]), 0).label(name) for name in FIGURES]
    statement = (
        select(*columns, *sums)
        .where(USAGE.c.hour >= wanted.begin, USAGE.c.hour < wanted.end)
        .group_by(*columns)
        .order_by(*columns)
        .limit(MAX_ROWS + 1)
    )
    if wanted.tenant is not None:
        statement = statement.where(USAGE.c.tenant == wanted.tenant)
    rows = [dict(row._mapping) for row in connection.execute(statement)]
    if len(rows) > MAX_ROWS:
        raise InvalidRequestError(
            f"from: the report has more than {MAX_ROWS} rows; ask for a shorter time, or for a "
            "coarser group",
            param="from",
        )
    # PostgreSQL sums big integers as Decimal
    return [{**row, **{name: int(row[name]) for name in FIGURES}} for row in rows]
