"""The settings that durability rests on, as the databases themselves tell them."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import IntegrityError
from storage_support import noted


def ask(question: str, connection: Connection) -> object:
    return connection.scalar(text(question))


def answers(url: str, *questions: str) -> list[object]:
    """What the writer's connection answers."""

    async def main() -> list[object]:
        async with noted(url) as database:
            return [await database.write(partial(ask, question)) for question in questions]

    return asyncio.run(main())


def test_sqlite_writes_a_log_and_waits_for_the_disk_at_each_commit(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.sqlite3'}"
    full = 2
    assert answers(url, "PRAGMA journal_mode", "PRAGMA synchronous") == ["wal", full]


def test_postgresql_waits_for_the_disk_though_the_databases_default_is_not_to(
    postgres_url: str,
) -> None:
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    engine.dispose()
    assert answers(postgres_url, "SHOW synchronous_commit") == ["on"]


def test_foreign_keys_hold(database_url: str) -> None:
    def make(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE parents (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE children (id INTEGER REFERENCES parents (id))"))

    def orphan(connection: Connection) -> None:
        connection.execute(text("INSERT INTO children VALUES (1)"))

    async def main() -> None:
        async with noted(database_url) as database:
            await database.write(make)
            with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
                await database.write(orphan)

    asyncio.run(main())


def test_errors_do_not_repeat_the_values_of_a_change(database_url: str) -> None:
    def twice(connection: Connection) -> None:
        for _ in range(2):
            connection.execute(text("INSERT INTO test_notes (text) VALUES (:t)"), {"t": "private"})

    async def main() -> None:
        async with noted(database_url) as database:
            with pytest.raises(IntegrityError) as raised:
                await database.write(twice)
            assert "[SQL parameters hidden" in str(raised.value)

    asyncio.run(main())
