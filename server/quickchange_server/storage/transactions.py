"""Group commit: several changes in one transaction, each as if it had its own.

If a commit is sent and its answer lost, PostgreSQL is asked later for the status of the
transaction's id, which outlives a crash of the server, so that no change is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.exc import DBAPIError

from quickchange_server.storage.outages import StillRunningError, passes

Change = Callable[[Connection], Any]


@dataclass(frozen=True, slots=True)
class ChangeOutcome:
    """The value that a change returned, or its error."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A commit that was sent but not answered."""

    transaction: str
    outcomes: list[ChangeOutcome]


class Transactions:
    """Makes transactions one after the other, on one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sent: _Sent | None = None

    def commit(self, changes: list[Change]) -> list[ChangeOutcome]:
        """Make the changes in one transaction; if one fails, again with a savepoint for each.

        The first try has no savepoints, since almost no change fails and PostgreSQL needs two more
        round trips for each. Raises if no change was made; if `passes(error)`, the same changes
        must be retried before any others.
        """
        if self._sent is not None and (outcomes := self._answer(self._sent)) is not None:
            return outcomes
        try:
            return self._transaction(changes, _make)
        except Exception as error:
            if passes(error) or len(changes) == 1:
                raise
        return self._transaction(changes, _make_apart)

    def _transaction(
        self, changes: list[Change], make: Callable[[Connection, Change], ChangeOutcome]
    ) -> list[ChangeOutcome]:
        with self._engine.connect() as connection, connection.begin() as transaction:
            outcomes = [make(connection, change) for change in changes]
            # Also fails if a change swallowed an error that has aborted the transaction: a commit
            # would silently roll back.
            number = _transaction_id(connection)
            self._sent = None if number is None else _Sent(number, outcomes)
            try:
                transaction.commit()
            except BaseException as error:
                if not passes(error):  # the server answered that the commit failed
                    self._sent = None
                raise
            self._sent = None
        return outcomes

    def _answer(self, sent: _Sent) -> list[ChangeOutcome] | None:
        """The outcomes, if that commit was made after all."""
        query = text("SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8))")
        with self._engine.connect() as connection:
            try:
                status = connection.execute(query, {"id": sent.transaction}).scalar()
            except DBAPIError as error:
                if passes(error):
                    raise
                status = None  # another server has taken over, which never saw the transaction
        if status == "in progress":
            raise StillRunningError(f"transaction {sent.transaction} has not ended")
        self._sent = None
        return sent.outcomes if status == "committed" else None


def _make(connection: Connection, change: Change) -> ChangeOutcome:
    return ChangeOutcome(change(connection))


def _make_apart(connection: Connection, change: Change) -> ChangeOutcome:
    try:
        with connection.begin_nested():
            outcome = ChangeOutcome(change(connection))
            # Fails if the change swallowed an error that aborted the transaction: rolling back to
            # the savepoint repairs it, while nothing would after a failed RELEASE.
            connection.execute(select(1))
            return outcome
    except Exception as error:
        if passes(error):
            raise
        return ChangeOutcome(error=error)


def _transaction_id(connection: Connection) -> str | None:
    """PostgreSQL's id of the running transaction; None if it wrote nothing, and on SQLite, whose
    commit has failed if it does not return."""
    if connection.dialect.name != "postgresql":
        return None
    query = text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)")
    number: str | None = connection.execute(query).scalar()
    return number
