"""Copies all that one database keeps to another: from SQLite to PostgreSQL, or back.

In one transaction on each side, so that the target holds all or nothing.

Deletes what nobody needs any more, beside running servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, Table, delete, exists, func, insert, select

from quickchange_server.errors import ConflictError
from quickchange_server.storage.database import check
from quickchange_server.storage.engines import make_engine, writing
from quickchange_server.storage.tables import all_tables
from quickchange_server.storage.tables_tenants import USAGE

BATCH = 1000  # rows of one insert

Progress = Callable[[str, int], None]  # a table's name and its rows


def move(source: str, target: str, progress: Progress) -> None:
    """Copy every table's rows. Both are URLs, and no server may be using either.

    Raises SettingError where one can't be used, ConflictError where the target holds rows.
    """
    for url in (source, target):
        check(url)
    tables = all_tables().sorted_tables  # those that others refer to first
    with (
        _engine(source) as old,
        _engine(target) as new,
        old.connect() as reader,
        writing(new).begin() as writer,
    ):
        _refuse_rows(writer, tables)
        for table in tables:
            progress(table.name, _copy(reader, writer, table))
            _continue_numbers(writer, table)


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


def _refuse_rows(connection: Connection, tables: list[Table]) -> None:
    for table in tables:
        if connection.scalar(select(exists().select_from(table))):
            raise ConflictError(
                f"the target's table {table.name} holds rows already; move to an empty database"
            )


def _copy(reader: Connection, writer: Connection, table: Table) -> int:
    rows = reader.execution_options(yield_per=BATCH).execute(select(table)).mappings()
    count = 0
    for batch in rows.partitions(BATCH):
        writer.execute(insert(table), [dict(row) for row in batch])
        count += len(batch)
    return count


def _continue_numbers(connection: Connection, table: Table) -> None:
    """Let PostgreSQL number new rows after those that came with their numbers."""
    column = table.autoincrement_column
    if column is None or connection.dialect.name != "postgresql":
        return
    highest = connection.scalar(select(func.max(column)))
    if highest is not None:
        sequence = func.pg_get_serial_sequence(table.name, column.name)
        connection.execute(select(func.setval(sequence, highest)))


def prune_usage(url: str, before: int) -> int:
    """Delete the usage of the hours that begin before `before`, Unix seconds; how many rows.

    An hour that has not ended must stay: servers write its rows whole, and would make them again.
    Raises SettingError where the database can't be used.
    """
    check(url)
    engine = make_engine(url)
    try:
        with writing(engine).begin() as connection:
            return connection.execute(delete(USAGE).where(USAGE.c.hour < before)).rowcount
    finally:
        engine.dispose()
