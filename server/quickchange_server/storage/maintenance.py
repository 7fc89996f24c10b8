"""Maintenance of the database: copying it to another one, and deleting old usage.

A copy from SQLite to PostgreSQL, or back, is one transaction on each side, so that the target gets
all rows or none. Usage can be deleted while servers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, Table, delete, exists, func, insert, select

from quickchange_server.errors import ConflictError
from quickchange_server.storage.database import check
from quickchange_server.storage.database_engines import make_engine, writing
from quickchange_server.storage.tables import all_tables
from quickchange_server.storage.tables_tenants import USAGE

BATCH = 1000  # rows of one insert

Progress = Callable[[str, int], None]  # gets a table's name and its number of rows


def move(source: str, target: str, progress: Progress) -> None:
    """Copy all rows from one database URL to another; no server may be using either.

    Raises SettingError if one can't be used, ConflictError if the target holds rows.
    """
    check(source, create=False)
    check(target)
    tables = all_tables().sorted_tables  # referenced tables first
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


def prune_usage(url: str, before: int) -> int:
    """Delete the usage of hours that begin before `before`, Unix seconds. Returns the row count.

    `before` must not be after the start of the current hour, whose rows servers would write again.
    Raises SettingError if the database can't be used.
    """
    check(url, create=False)
    with _engine(url) as engine, writing(engine).begin() as connection:
        return connection.execute(delete(USAGE).where(USAGE.c.hour < before)).rowcount


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
    """Set PostgreSQL's sequence past the highest number copied."""
    column = table.autoincrement_column
    if column is None or connection.dialect.name != "postgresql":
        return
    highest = connection.scalar(select(func.max(column)))
    if highest is not None:
        sequence = func.pg_get_serial_sequence(table.name, column.name)
        connection.execute(select(func.setval(sequence, highest)))
