"""Distinction between transient database errors and errors of the statements sent to it."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

# SQLSTATE classes and codes of PostgreSQL (its manual, appendix A): 08 connection, 25006 a standby
# that does not write yet, 40 rolled back in favour of others, 53 out of memory, disk or
# connections, 55P03 lock, 57P shutting down or starting, 58 disk failure.
_PASSING_STATES = ("08", "25006", "40", "53", "55P03", "57P", "58")
_DISK_FULL = "53100"
_PASSING_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
}


class StillRunningError(Exception):
    """A commit whose answer was lost is still in progress."""


def is_full(error: BaseException | None) -> bool:
    """True if the database's disk is full."""
    original = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(original, sqlite3.Error):
        return getattr(original, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return getattr(original, "sqlstate", None) == _DISK_FULL


def passes(error: BaseException) -> bool:
    """True if the same transaction may succeed later."""
    if isinstance(error, StillRunningError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", 0)  # absent if the driver itself refused
        return code & 0xFF in _PASSING_SQLITE  # the low byte is the primary code
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # the client could not connect
        return type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout")
    return str(state).startswith(_PASSING_STATES)
