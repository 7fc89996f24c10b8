"""The MetaData of all tables, the table of revisions, and INSERT … ON CONFLICT.

A domain adds its tables in a file `tables_<domain>.py` in this folder, or in one of its own below
it, and its migrations as a
separate Alembic branch in `migrations/versions` (`<domain>_0001.py`, no down revision, the domain
as branch label), so that domains evolve independently. The naming convention gives each constraint
a name, by which a migration can drop it.
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

# Number of changes to a topic's definitions; replicas poll it.
REVISIONS = Table(
    "revisions",
    METADATA,
    Column("topic", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
)


def all_tables() -> MetaData:
    """METADATA after importing the tables of every domain."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if module.name.rpartition(".")[2].startswith("tables_"):
            importlib.import_module(module.name)
    return METADATA


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """The dialect's INSERT, which has `on_conflict_do_update` and `on_conflict_do_nothing`."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
