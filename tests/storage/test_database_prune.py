"""`quickchange database prune`: usage before a day goes, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, insert, select
from typer.testing import CliRunner

from quickchange_server.storage import database
from quickchange_server.storage.cli import app
from quickchange_server.storage.tables_tenants import USAGE

HOUR = 3600
DAY = int(datetime(2026, 2, 1, tzinfo=UTC).timestamp())
FIGURES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "failed")


def fill(url: str, hours: list[int]) -> None:
    database.check(url)
    place = {"tenant": "t", "key": "k", "adapter": "base", "process": "p"}
    rows = [{"hour": hour, **place, **dict.fromkeys(FIGURES, 1)} for hour in hours]
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(insert(USAGE), rows)
    engine.dispose()


def hours_at(url: str) -> list[int]:
    engine = create_engine(url)
    with engine.connect() as connection:
        hours = list(connection.scalars(select(USAGE.c.hour).order_by(USAGE.c.hour)))
    engine.dispose()
    return hours


def test_prune_deletes_the_usage_of_the_days_before(database_url: str) -> None:
    fill(database_url, [0, DAY - HOUR, DAY, DAY + HOUR])
    done = CliRunner().invoke(app, ["prune", database_url, "--before", "2026-02-01"])
    assert (done.exit_code, done.stdout) == (0, "usage: 2 rows deleted\n")
    assert hours_at(database_url) == [DAY, DAY + HOUR]


@pytest.mark.parametrize("days", [1, 400])
def test_a_day_to_come_is_refused(database_url: str, days: int) -> None:
    fill(database_url, [DAY])
    day = (datetime.now(UTC) + timedelta(days)).strftime("%Y-%m-%d")
    done = CliRunner().invoke(app, ["prune", database_url, "--before", day])
    assert done.exit_code == 2
    assert hours_at(database_url) == [DAY]
