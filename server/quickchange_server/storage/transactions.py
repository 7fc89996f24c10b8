"""Commits several changes in one transaction, each as if it had one of its own.

Where a commit is sent and no answer comes, PostgreSQL is asked later whether it was made (by the
transaction's id, which outlives a crash of the server), so that a change is never made twice.
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
    """What a change came to: its value, or why it failed."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A commit that was sent and not answered."""

    transaction: str
    outcomes: list[ChangeOutcome]


class Transactions:
    """Makes one after the other; not for several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sent: _Sent | None = None

    def commit(self, changes: list[Change]) -> list[ChangeOutcome]:
        """Make the changes in one transaction; where one fails, once more with each apart.

        At first without savepoints, since almost no change fails: to PostgreSQL they are two
        more round trips a change. Raises where none was made; if `passes` says so of the error,
        the same changes are to be tried again before any others.
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
            # Also fails where a change has hidden an error of its own, which has ended the
            # transaction: a commit would roll back without a word.
            number = _transaction_id(connection)
            self._sent = None if number is None else _Sent(number, outcomes)
            try:
                transaction.commit()
            except BaseException as error:
                if not passes(error):  # the server's answer: it was not made
                    self._sent = None
                raise
            self._sent = None
        return outcomes

    def _answer(self, sent: _Sent) -> list[ChangeOutcome] | None:
        """The outcomes, where that commit was made after all."""
        query = text("SELECT pg_xact_status(CAST(CAST(:id AS text) AS xid8))")
        with self._engine.connect() as connection:
            try:
                status = connection.execute(query, {"id": sent.transaction}).scalar()
            except DBAPIError as error:
                if passes(error):
                    raise
                status = None  # another server has taken over, which never saw it
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
            # Fails where the change has hidden an error that ended the transaction: here going
            # back to the savepoint mends it, while after a failed RELEASE nothing would.
            connection.execute(select(1))
            return outcome
    except Exception as error:
        if passes(error):
            raise
        return ChangeOutcome(error=error)


def _transaction_id(connection: Connection) -> str | None:
    """PostgreSQL's id of the running transaction. None where it wrote nothing, or on SQLite, whose
    commit has failed wherever it does not return."""
    if connection.dialect.name != "postgresql":
        return None
    query = text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)")
    number: str | None = connection.execute(query).scalar()
    return number
