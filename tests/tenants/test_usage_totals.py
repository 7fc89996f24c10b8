"""Usage rows: totals of one process, written whole, so that repetition and loss change nothing."""

from __future__ import annotations

import asyncio

from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_observers import Completed, Ending, Opened
from quickchange_server.storage.database import Database
from quickchange_server.tenants.usage_log import HOUR, UsageLog, UsageQuery, report

CALLER = Caller("acme", "key", "infer")


def completed(label: str = "sql", ending: Ending = "stop", tokens: int = 3) -> Completed:
    opened = Opened("id", CALLER, label, label, 5, 9, 1, 0.0)
    return Completed(opened, ending, completion_tokens=tokens, cached_tokens=2)


def reported(url: str, *adds: tuple[UsageLog, Completed, float]) -> dict[int, int]:
    """Completion tokens by hour, after these were added in this order."""
    wanted = UsageQuery(0, 10**11, None, ("hour",))

    async def work() -> dict[int, int]:
        database = Database.open(url)
        for log, one, now in adds:
            log.database = database
            await log.add(one, "key", now)
        rows = await database.read(lambda connection: report(connection, wanted))
        await database.close()
        return {row["hour"]: row["completion_tokens"] for row in rows}

    return asyncio.run(work())


def log() -> UsageLog:
    return UsageLog(None)  # type: ignore[arg-type]


def test_each_hour_has_its_own_totals(database_url: str) -> None:
    one = log()
    adds = [
        (one, completed(), HOUR - 1.0),
        (one, completed(), 1.0 * HOUR),
        (one, completed(), HOUR),
    ]
    assert reported(database_url, *adds) == {0: 3, HOUR: 6}


def test_processes_add_up(database_url: str) -> None:
    one, two = log(), log()
    adds = [(one, completed(), 1.0), (two, completed(), 2.0), (one, completed(), 3.0)]
    assert reported(database_url, *adds) == {0: 9}


def test_a_clock_that_is_set_back_loses_nothing(database_url: str) -> None:
    one = log()
    adds = [(one, completed(), 1.0), (one, completed(), HOUR + 1.0), (one, completed(), 2.0)]
    assert sum(reported(database_url, *adds).values()) == 9


def test_a_lost_write_is_made_good_by_the_next(database_url: str) -> None:
    class Lossy:
        """Drops what it is given."""

        def record(self, _change: object) -> asyncio.Future[None]:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(OSError("gone"))
            future.exception()
            return future

    one = log()

    async def lose() -> None:
        one.database = Lossy()  # type: ignore[assignment]
        one.add(completed(), "key", 1.0)

    asyncio.run(lose())
    assert reported(database_url, (one, completed(), 2.0)) == {0: 6}
