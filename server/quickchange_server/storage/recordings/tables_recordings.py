"""Tables of recordings and of the requests in them, and their queries.

A recording belongs to a tenant and an adapter's name; nobody else's queries find it.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Double,
    Index,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    delete,
    func,
    or_,
    select,
)

from quickchange_server.storage.tables import METADATA, insert
from quickchange_server.storage.tables_experiments import ID

OVERHEAD_BYTES = 512  # of a row, besides its tokens: so many short ones are bounded too
_TOKEN = "I"  # array type of token ids, four bytes

RECORDINGS = Table(
    "recordings",
    METADATA,
    Column("tenant", String(256), primary_key=True),
    Column("adapter", String(256), primary_key=True),  # its own name
    Column("since", Double, nullable=False),  # Unix seconds
)

RECORDED_REQUESTS = Table(
    "recorded_requests",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("tenant", String(256), nullable=False),
    Column("adapter", String(256), nullable=False),
    Column("digest", String(64), nullable=False),  # of the version that answered
    Column("base", Text, nullable=False),  # the base model's name
    Column("at", Double, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("prompt", LargeBinary, nullable=False),  # token ids, four bytes each, little-endian
    Column("output", LargeBinary, nullable=False),
    Index(None, "tenant", "adapter", "id"),
)
_ON, _ROWS = RECORDINGS.c, RECORDED_REQUESTS.c


@dataclass(frozen=True, slots=True, order=True)
class Recording:
    """Whose requests to which adapter are recorded."""

    tenant: str
    adapter: str


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request, as it is kept: no key, no user, no text."""

    digest: str
    base: str
    at: float  # Unix seconds
    prompt: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def size(self) -> int:
        return 4 * (len(self.prompt) + len(self.output)) + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class RecordingState:
    """A recording's size so far."""

    recording: Recording
    since: float  # Unix seconds
    requests: int
    bytes: int


def switch_on(connection: Connection, recording: Recording, now: float) -> None:
    """Begin a recording; one that is there goes on."""
    row = {"tenant": recording.tenant, "adapter": recording.adapter, "since": now}
    connection.execute(insert(connection, RECORDINGS).values(row).on_conflict_do_nothing())


def switch_off(connection: Connection, recording: Recording) -> bool:
    """End a recording and delete its requests; False if there is none."""
    connection.execute(delete(RECORDED_REQUESTS).where(_rows_of(recording)))
    return connection.execute(delete(RECORDINGS).where(_of(recording))).rowcount > 0


def every(connection: Connection) -> list[Recording]:
    """All that is recorded."""
    return [Recording(row.tenant, row.adapter) for row in connection.execute(select(RECORDINGS))]


def states(connection: Connection, tenant: str) -> list[RecordingState]:
    """The tenant's recordings, by name."""
    counted = func.count(_ROWS.id), func.coalesce(func.sum(_ROWS.bytes), 0)
    same = and_(_ROWS.tenant == _ON.tenant, _ROWS.adapter == _ON.adapter)
    found = connection.execute(
        select(_ON.adapter, _ON.since, *counted)
        .select_from(RECORDINGS.outerjoin(RECORDED_REQUESTS, same))
        .where(_ON.tenant == tenant)
        .group_by(_ON.adapter, _ON.since)
        .order_by(_ON.adapter)
    )
    return [
        RecordingState(Recording(tenant, adapter), since, int(requests), int(size))
        for adapter, since, requests, size in found
    ]


def requests(connection: Connection, recording: Recording) -> list[RecordedRequest]:
    """What a recording holds, the oldest first."""
    found = connection.execute(
        select(RECORDED_REQUESTS).where(_rows_of(recording)).order_by(_ROWS.id)
    )
    return [
        RecordedRequest(row.digest, row.base, row.at, _tokens(row.prompt), _tokens(row.output))
        for row in found
    ]


def keep(
    connection: Connection,
    recording: Recording,
    request: RecordedRequest,
    *,
    most: int,
    most_bytes: int,
) -> None:
    """Add a request while its recording is on, and delete the oldest beyond the bounds."""
    if connection.execute(select(_ON.since).where(_of(recording))).first() is None:
        return
    row = {
        "tenant": recording.tenant,
        "adapter": recording.adapter,
        "digest": request.digest,
        "base": request.base,
        "at": request.at,
        "bytes": request.size,
        "prompt": _packed(request.prompt),
        "output": _packed(request.output),
    }
    connection.execute(RECORDED_REQUESTS.insert().values(row))
    newest = _ROWS.id.desc()
    sized = (
        select(
            _ROWS.id,
            func.row_number().over(order_by=newest).label("place"),
            func.sum(_ROWS.bytes).over(order_by=newest).label("total"),
        )
        .where(_rows_of(recording))
        .subquery()
    )
    beyond = select(sized.c.id).where(or_(sized.c.place > most, sized.c.total > most_bytes))
    connection.execute(delete(RECORDED_REQUESTS).where(_ROWS.id.in_(beyond)))


def answering(connection: Connection) -> dict[str, set[str]]:
    """The digests that have answered recorded requests, by adapter; adapters without any too."""
    found: dict[str, set[str]] = {recording.adapter: set() for recording in every(connection)}
    for row in connection.execute(select(_ROWS.adapter, _ROWS.digest).distinct()):
        found.setdefault(row.adapter, set()).add(row.digest)
    return found


def forget(connection: Connection, adapters: Collection[str], digests: Collection[str]) -> None:
    """End all tenants' recordings of `adapters`, and delete what `digests` answered."""
    connection.execute(delete(RECORDINGS).where(_ON.adapter.in_(adapters)))
    gone = or_(_ROWS.adapter.in_(adapters), _ROWS.digest.in_(digests))
    connection.execute(delete(RECORDED_REQUESTS).where(gone))


def _of(recording: Recording) -> ColumnElement[bool]:
    return and_(_ON.tenant == recording.tenant, _ON.adapter == recording.adapter)


def _rows_of(recording: Recording) -> ColumnElement[bool]:
    return and_(_ROWS.tenant == recording.tenant, _ROWS.adapter == recording.adapter)


def _packed(tokens: Sequence[int]) -> bytes:
    return array(_TOKEN, tokens).tobytes()


def _tokens(packed: bytes) -> tuple[int, ...]:
    return tuple(array(_TOKEN, packed))
