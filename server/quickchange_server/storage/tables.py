"""The one MetaData that all tables hang on, and the table that storage itself needs.

A domain adds its tables in a file `tables_<domain>.py` beside this one, and its migrations as an
Alembic branch of its own in `migrations/versions` (`<domain>_0001.py`, no down revision, the
domain as branch label), so that domains grow without knowing of each other. Constraints get their
names from the convention below: a migration can name what it drops.

INSERT ... ON CONFLICT, which SQLite and PostgreSQL spell alike and SQLAlchemy has for each.
"""

from __future__ import annotations

import importlib
import pkgutil

from sqlalchemy import BigInteger, Column, Connection, MetaData, String, Table
from sqlalchemy.dialects import postgresql, sqlite

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# How often the definitions of a topic have changed; replicas poll it.
REVISIONS = Table(
    "revisions",
    METADATA,
    Column("topic", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
)


def all_tables() -> MetaData:
    """METADATA with every domain's tables on it, whoever has imported them."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.startswith("tables_"):
            importlib.import_module(f"{package}.{module.name}")
    return METADATA


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that has `on_conflict_do_update` and `on_conflict_do_nothing`."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
