"""Table of stored responses, and its queries. A response is seen by its owner alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Double,
    Index,
    String,
    Table,
    Text,
    and_,
    delete,
    func,
    literal,
    select,
    update,
)

from quickchange_server.storage.tables import METADATA, insert

OVERHEAD_BYTES = 512  # of a row, besides its document: so many small ones are bounded too
SWEPT_AT_ONCE = 500  # rows that one transaction deletes

STORED_RESPONSES = Table(
    "stored_responses",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(256), nullable=False),
    Column("key", String(256), nullable=False),  # the API key's id; "" where none is asked for
    Column("previous", String(64)),  # id of the response that it continues
    Column("expires", Double, nullable=False, index=True),  # Unix seconds
    Column("bytes", BigInteger, nullable=False),
    Column("document", Text, nullable=False),  # JSON
    Index(None, "tenant", "expires", "bytes"),
)
_ROWS = STORED_RESPONSES.c


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a response is: a tenant, by one of its API keys."""

    tenant: str
    key: str


@dataclass(frozen=True, slots=True)
class Link:
    """A response of a conversation, without its document."""

    id: str
    previous: str | None
    bytes: int


def _owned(owner: Owner, now: float) -> ColumnElement[bool]:
    return and_(_ROWS.tenant == owner.tenant, _ROWS.key == owner.key, _ROWS.expires > now)


def chain(connection: Connection, owner: Owner, last: str, *, most: int, now: float) -> list[Link]:
    """A response and those that it continues, the last first; `most` of them."""
    columns = (_ROWS.id, _ROWS.previous, _ROWS.bytes)
    owned = _owned(owner, now)
    begin = select(*columns, literal(1).label("depth")).where(_ROWS.id == last, owned)
    links = begin.cte("links", recursive=True)
    before = select(*columns, links.c.depth + 1).where(
        _ROWS.id == links.c.previous, links.c.depth < most, owned
    )
    links = links.union_all(before)
    found = connection.execute(select(links).order_by(links.c.depth))
    return [Link(row.id, row.previous, row.bytes) for row in found]


def sizes(connection: Connection, owner: Owner, ids: Sequence[str], *, now: float) -> list[Link]:
    """Those of the responses that are there."""
    found = connection.execute(
        select(_ROWS.id, _ROWS.previous, _ROWS.bytes).where(_ROWS.id.in_(ids), _owned(owner, now))
    )
    return [Link(row.id, row.previous, row.bytes) for row in found]


def documents(
    connection: Connection, owner: Owner, ids: Sequence[str], *, now: float
) -> dict[str, str]:
    """The documents of those of the responses that are there, by id."""
    found = connection.execute(
        select(_ROWS.id, _ROWS.document).where(_ROWS.id.in_(ids), _owned(owner, now))
    )
    return {row.id: row.document for row in found}


def write(
    connection: Connection,
    owner: Owner,
    link: Link,
    document: str,
    *,
    continued: Sequence[str],
    expires: float,
) -> None:
    """Insert a response; those that it continues (`continued`) stay as long as it does."""
    row = {
        "id": link.id,
        "tenant": owner.tenant,
        "key": owner.key,
        "previous": link.previous,
        "expires": expires,
        "bytes": link.bytes,
        "document": document,
    }
    statement = insert(connection, STORED_RESPONSES).values(row)
    connection.execute(statement.on_conflict_do_nothing(index_elements=[_ROWS.id]))
    if continued:
        connection.execute(
            update(STORED_RESPONSES)
            .where(_ROWS.id.in_(continued), _ROWS.expires < expires)
            .values(expires=expires)
        )


def remove(connection: Connection, owner: Owner, id: str, *, now: float) -> bool:
    """Delete a response; False if there is none."""
    gone = connection.execute(delete(STORED_RESPONSES).where(_ROWS.id == id, _owned(owner, now)))
    return gone.rowcount > 0


def crowded(connection: Connection, most_bytes: int) -> dict[str, int]:
    """Tenants whose responses take more than `most_bytes`, with how much too much."""
    total = func.sum(_ROWS.bytes)
    found = connection.execute(
        select(_ROWS.tenant, total.label("total")).group_by(_ROWS.tenant).having(total > most_bytes)
    )
    return {row.tenant: int(row.total) - most_bytes for row in found}


def sweep_expired(connection: Connection, now: float) -> int:
    """Delete what has expired, `SWEPT_AT_ONCE` rows at most. Returns how many."""
    ids = select(_ROWS.id).where(_ROWS.expires <= now).limit(SWEPT_AT_ONCE)
    return connection.execute(delete(STORED_RESPONSES).where(_ROWS.id.in_(ids))).rowcount


def sweep_oldest(connection: Connection, tenant: str, excess: int) -> int:
    """Delete a tenant's oldest responses of `excess` bytes together, `SWEPT_AT_ONCE` rows at most.
    Returns the bytes."""
    oldest = connection.execute(
        select(_ROWS.id, _ROWS.bytes)
        .where(_ROWS.tenant == tenant)
        .order_by(_ROWS.expires)
        .limit(SWEPT_AT_ONCE)
    )
    ids, freed = [], 0
    for row in oldest:
        if freed >= excess:
            break
        ids.append(row.id)
        freed += row.bytes
    connection.execute(delete(STORED_RESPONSES).where(_ROWS.id.in_(ids)))
    return freed
