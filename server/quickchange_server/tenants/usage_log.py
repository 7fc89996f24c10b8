"""Usage for billing: requests and tokens by hour, tenant, key and adapter. Durable and exact.

Each process writes totals to rows of its own, so that a repeated write, or a lost one followed by
the next, leaves the right figure. Tokens are those that the responses report; a failed request is
counted as failed, and its tokens are not billed.
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
MAX_ROWS = 10_000  # in one report

Group = Literal["hour", "tenant", "key", "adapter"]
GROUPS: tuple[Group, ...] = get_args(Group)
FIGURES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed")


@dataclass(frozen=True, slots=True)
class _Place:
    """The identity of a row within its process."""

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
    """This process's rows of the current hour. Used on the event loop only."""

    database: Database
    process: str = field(default_factory=lambda: secrets.token_hex(8))
    _hour: int = 0
    _totals: dict[_Place, _Totals] = field(default_factory=dict)

    def add(self, completed: Completed, key: str, now: float) -> Future[None]:
        """Count a request that ended at `now`, Unix seconds. The future is done when the row is
        committed."""
        hour = int(now) // HOUR * HOUR
        if hour > self._hour:  # a clock set back must not restart an hour's totals
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
    """The range, filter and grouping of a usage report."""

    begin: int  # Unix seconds of an hour's start, included
    end: int  # Unix seconds of an hour's start, excluded
    tenant: str | None  # None: all
    group: Sequence[Group]


def report(connection: Connection, wanted: UsageQuery) -> list[dict[str, Any]]:
    """Rows with the group's columns and FIGURES. Raises InvalidRequestError if there are more than
    MAX_ROWS."""
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
    # PostgreSQL returns sums of big integers as Decimal.
    return [{**row, **{name: int(row[name]) for name in FIGURES}} for row in rows]
