"""A table of its own for tests of the database, and a database to use it with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    select,
)

from quickchange_server.storage.database import Database

NOTES = Table(
    "test_notes",
    MetaData(),
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order of insertion
    Column("text", String(200), nullable=False, unique=True),
)


def note(text: str) -> Callable[[Connection], None]:
    """A change that adds a row."""

    def change(connection: Connection) -> None:
        connection.execute(insert(NOTES).values(text=text))

    return change


def notes(connection: Connection) -> list[str]:
    """The rows' text in the order they were added."""
    return list(connection.scalars(select(NOTES.c.text).order_by(NOTES.c.number)))


def notes_at(url: str) -> list[str]:
    """The rows, by a connection that has nothing to do with the server's."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return notes(connection)
    finally:
        engine.dispose()


@asynccontextmanager
async def noted(url: str) -> AsyncIterator[Database]:
    """A database with the table of notes."""
    database = await asyncio.to_thread(Database.open, url)
    try:
        await database.write(NOTES.metadata.create_all)
        yield database
    finally:
        await database.close()
