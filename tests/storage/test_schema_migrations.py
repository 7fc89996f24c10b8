"""The tables: migrations make what the metadata says, once, whoever comes first."""

from __future__ import annotations

import asyncio

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text

from quickchange_server.errors import SettingError
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables import all_tables


def opened_and_closed(url: str) -> None:
    asyncio.run(Database.open(url).close())


def test_migrations_make_the_tables_that_the_metadata_describes(database_url: str) -> None:
    opened_and_closed(database_url)
    engine = create_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, all_tables()) == []
    engine.dispose()


def test_opening_again_changes_nothing(database_url: str) -> None:
    opened_and_closed(database_url)
    opened_and_closed(database_url)


@pytest.mark.parametrize("domain", ["storage", "tenants", "experiments", "responses"])
def test_a_database_that_has_a_part_of_the_migrations_gets_the_others_and_keeps_its_rows(
    database_url: str, domain: str
) -> None:
    config = Config()
    config.set_main_option("script_location", "quickchange_server.storage:migrations")
    table, row = {
        "storage": ("revisions", "('t', 7)"),
        "tenants": ("usage", "(0, 't', 'k', 'a', 'p', 1, 2, 3, 4, 5)"),
        "experiments": ("experiments", "('i', 'n', 1, '{}')"),
        "responses": ("stored_responses", "('i', 't', 'k', NULL, 1, 1, '{}')"),
    }[domain]
    engine = create_engine(database_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, f"{domain}@head")
        connection.execute(text(f'INSERT INTO "{table}" VALUES {row}'))
    opened_and_closed(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), all_tables()) == []
        assert connection.execute(text(f'SELECT count(*) FROM "{table}"')).scalar() == 1
    engine.dispose()


def test_tables_newer_than_this_version_are_refused(database_url: str) -> None:
    opened_and_closed(database_url)
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO alembic_version VALUES ('storage_9999')"))
    engine.dispose()
    with pytest.raises(SettingError, match=r"database: .*newer .*storage_9999") as raised:
        Database.open(database_url)
    assert raised.value.param == "database"
