"""SQLAlchemy engines by URL: the supported databases, their guarantees, and errors in a URL.

SQLite: write-ahead log, each commit on the disk before it returns, a file that only its owner may
read. PostgreSQL: psycopg, a commit acknowledged only when it is on the disk, and a lost server
noticed within seconds.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from quickchange_server.errors import SettingError

READERS = 4  # reader threads, each with a connection
BEGIN = "quickchange_begin"  # execution option: the statement that begins a SQLite transaction
BUSY_SECONDS = 10.0  # SQLite's wait for another process's transaction
# A lost server is noticed after some 15 seconds instead of TCP's quarter of an hour.
_POSTGRES = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# A connection for each thread; no values in errors, since those are logged.
_COMMON: dict[str, Any] = {"pool_size": READERS + 1, "max_overflow": 0, "hide_parameters": True}
_KINDS = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


def make_engine(url: str, *, create: bool = True) -> Engine:
    """The engine for a URL, not connected yet; a SQLite file is made where `create` allows it.

    Raises SettingError if the URL is wrong, or the file is missing and not to be made.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed, create=create)
    return _postgres(parsed)


@contextmanager
def provisional(url: str) -> Iterator[Callable[[], None]]:
    """A time in which a new SQLite file is on trial: it stays if the given function is called.

    Otherwise it goes at the end, with the folders made for it, unless another process uses it.
    """
    file = _file_of(_parsed(url))
    missing = [p for p in (file, *file.parents) if not p.exists()] if file is not None else []
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        yield keep
    finally:
        if not kept and file is not None and file in missing and _unused(file):
            file.unlink()
            for folder in missing[1:]:
                with contextlib.suppress(OSError):  # something else has been put there
                    folder.rmdir()


def _unused(file: Path) -> bool:
    """True if the SQLite file is there and no connection is open to it."""
    if not file.exists():
        return False
    connection = sqlite3.connect(file, timeout=0, isolation_level=None)
    try:  # leaving the write-ahead log needs the file for itself
        connection.execute("PRAGMA journal_mode=DELETE").close()
    except sqlite3.Error:
        return False
    finally:
        connection.close()
    return True


def _file_of(url: URL) -> Path | None:
    """The file of a SQLite database; None for another kind, or no plain file."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name.startswith((":memory:", "file:")):
        return None
    return Path(name)


def writing(engine: Engine) -> Engine:
    """The same engine and pool, for transactions that write.

    SQLite's take the write lock when they begin: one that reads first and then writes would fail
    instead of waiting for another process's transaction.
    """
    return engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})


def reading(engine: Engine) -> Engine:
    """The same engine and pool, for transactions that read one snapshot.

    SQLite's always do. By PostgreSQL's default each statement would see commits made since the
    one before, and an experiment's sums would not agree with its counts.
    """
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def unusable(engine: Engine, error: DBAPIError) -> SettingError:
    """The error for a database that can't be opened; it hides the URL's password."""
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
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
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


def _sqlite(url: URL, *, create: bool) -> Engine:
    file = _file_of(url)
    if file is None:
        raise SettingError(
            "database: SQLite needs a plain file, sqlite:///FILE (an absolute path has four "
            "slashes)",
            param="database",
        )
    if not create and not file.exists():
        raise SettingError(
            f"database: no database here: {file}; see the path (--database, or --store); "
            "`quickchange serve` or `quickchange keys create` makes one",
            param="database",
        )
    _make_private(file)
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        **_COMMON,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """Create the file with mode 600; SQLite gives its log files the same mode."""
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
    """Switch to the write-ahead log, retrying while another process uses the file.

    SQLite does not wait for this statement; of replicas that start together, one in a hundred
    would fail.
    """
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
    """Make commits durable even if the server's or the user's default is otherwise."""
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.commit()
