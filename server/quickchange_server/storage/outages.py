"""Tells an error of the database's absence, which passes, from an error of what was asked of it."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

# SQLSTATE classes and codes of PostgreSQL (its manual, appendix A): connections, rolled back by
# the server for others' sake, out of memory, disk or connections, locks, shutting down or
# starting, its disk fails; a standby that does not write yet.
_PASSING_STATES = ("08", "25006", "40", "53", "55P03", "57P", "58")
_PASSING_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
}


class StillRunningError(Exception):
    """A commit whose answer was lost is still being made."""


def passes(error: BaseException) -> bool:
    """Whether the same transaction may succeed later."""
    if isinstance(error, StillRunningError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", 0)  # none where the driver itself refused
        return code & 0xFF in _PASSING_SQLITE  # the low byte is the primary code
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # from the client's side: no connection came about
        return type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout")
    return str(state).startswith(_PASSING_STATES)
