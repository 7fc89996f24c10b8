"""Everything that one database keeps comes to another, or nothing."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select
from storage_support import NOTES, note, noted, notes
from typer.testing import CliRunner

from quickchange_server.storage import maintenance
from quickchange_server.storage.cli import app
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import bump
from quickchange_server.storage.tables import REVISIONS, all_tables


def filled(url: str, topics: list[str]) -> None:
    async def main() -> None:
        database = Database.open(url)
        for topic in topics:
            await database.write(partial(bump, topic=topic))
        await database.close()

    asyncio.run(main())


def kept(url: str) -> dict[str, int]:
    async def main() -> dict[str, int]:
        database = Database.open(url)
        rows = await database.read(lambda connection: connection.execute(select(REVISIONS)).all())
        await database.close()
        return {row.topic: row.number for row in rows}

    return asyncio.run(main())


def test_move_copies_every_table(tmp_path: Path, database_url: str) -> None:
    source = f"sqlite:///{tmp_path / 'source.sqlite3'}"
    filled(source, ["keys", "experiments", "keys"])
    result = CliRunner().invoke(app, ["move", source, database_url])
    assert result.exit_code == 0, result.output
    assert {line.split(":")[0] for line in result.output.splitlines()} == set(all_tables().tables)
    assert kept(database_url) == {"keys": 2, "experiments": 1}


def test_a_target_with_rows_is_refused_and_stays_as_it_is(
    tmp_path: Path, database_url: str
) -> None:
    source = f"sqlite:///{tmp_path / 'source.sqlite3'}"
    filled(source, ["keys"])
    filled(database_url, ["experiments"])
    result = CliRunner().invoke(app, ["move", source, database_url])
    assert result.exit_code == 1
    assert "table revisions holds rows already" in str(result.output)
    assert kept(database_url) == {"experiments": 1}


def test_rows_keep_their_numbers_and_new_ones_go_on_after_them(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"sqlite:///{tmp_path / 'source.sqlite3'}"
    texts = [f"n{number}" for number in range(5)]
    monkeypatch.setattr(maintenance, "all_tables", lambda: NOTES.metadata)
    monkeypatch.setattr(maintenance, "BATCH", 2)

    async def main() -> None:
        async with noted(source) as database, noted(database_url):
            for text in texts:
                await database.write(note(text))
        maintenance.move(source, database_url, lambda _table, _rows: None)
        async with noted(database_url) as database:
            await database.write(note("new"))
            assert await database.read(notes) == [*texts, "new"]

    asyncio.run(main())
