"""Deletes what nobody needs any more, beside running servers."""

from __future__ import annotations

from sqlalchemy import delete

from quickchange_server.storage.database import check
from quickchange_server.storage.engines import make_engine, writing
from quickchange_server.storage.tables_tenants import USAGE


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
