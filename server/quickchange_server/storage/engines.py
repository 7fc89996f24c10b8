"""Makes the SQLAlchemy engine of a URL: which databases, with what guarantees, and what is wrong.

SQLite: write-ahead log, each commit on the disk before it returns, a file that its owner alone may
read. PostgreSQL: psycopg, a commit acknowledged only when it is on the disk, and a server that has
vanished is noticed within seconds.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from quickchange_server.errors import SettingError

READERS = 4  # threads that read, each with a connection
BEGIN = "quickchange_begin"  # execution option: how a SQLite transaction begins
BUSY_SECONDS = 10.0  # what SQLite waits for another process' transaction
# A lost server is noticed after some 15 seconds and not after TCP's quarter of an hour.
_POSTGRES = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# A connection for each thread; no values in errors, which are logged.
_COMMON: dict[str, Any] = {"pool_size": READERS + 1, "max_overflow": 0, "hide_parameters": True}
_KINDS = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


def make_engine(url: str) -> Engine:
    """The engine, not connected yet. Raises SettingError that says what is wrong with the URL."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed)
    return _postgres(parsed)


def writing(engine: Engine) -> Engine:
    """The same engine and pool for transactions that write.

    SQLite's take the write lock as they begin: one that reads first and then writes could not
    wait for another process' transaction, but would fail.
    """
    return engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})


def reading(engine: Engine) -> Engine:
    """The same engine and pool for transactions that read: all that one reads is of one moment.

    SQLite's are so anyway; by PostgreSQL's default each statement would see what has been
    committed since the one before, and an experiment's sums would not go with its counts.
    """
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def unusable(engine: Engine, error: DBAPIError) -> SettingError:
    """What to tell where the database can't be opened."""
    shown = engine.url.render_as_string(hide_password=True)
    reason = str(error.orig).strip().splitlines()[0] if str(error.orig) else repr(error.orig)
    return SettingError(
        f"database: {shown} can't be used: {reason}; see that it is there and may be written, "
        "or name another with --database",
        param="database",
    )


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise SettingError(
            f"database: not a database's URL; it looks like {_KINDS}", param="database"
        ) from None  # SQLAlchemy's message repeats the URL, password and all
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise SettingError(
            f"database: {parsed.drivername} is not supported; use {_KINDS}", param="database"
        )
    return parsed


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise SettingError(
            "database: SQLite needs a plain file, sqlite:///FILE (an absolute path has four "
            "slashes)",
            param="database",
        )
    _make_private(Path(url.database))
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        **_COMMON,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """Create the file for its owner alone; SQLite gives its log files the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise SettingError(
            f"database: {path} can't be written: {error.strerror}; name another with --database",
            param="database",
        ) from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own transactions break SAVEPOINT
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    _use_log(connection)


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. For this alone SQLite does not wait, but fails where another
    process uses the file: with replicas that start together, one in a hundred."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(BEGIN, "BEGIN"))


def _postgres(url: URL) -> Engine:
    given = {name: value for name, value in _POSTGRES.items() if name not in url.query}
    try:
        engine = create_engine(url, connect_args=given, pool_recycle=1800, **_COMMON)
    except ImportError as error:
        raise SettingError(
            "database: PostgreSQL needs its driver: pip install 'quickchange[postgres]'",
            param="database",
        ) from error
    event.listen(engine, "connect", _prepare_postgres)
    return engine


def _prepare_postgres(connection: Any, _record: object) -> None:
    """Make commits durable where the server's or the user's default is that they are not."""
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()
