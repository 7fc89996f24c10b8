"""Any interleaving of records, writes and changes that fail keeps the order and loses nothing."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from typing import Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete
from storage_support import NOTES, note, noted, notes

Step = Literal["record", "write", "record fails", "write fails", "record twice", "yield"]
STEPS = st.lists(
    st.sampled_from(
        ("record", "record", "record", "write", "record fails", "write fails", "record twice",
         "yield")
    ),
    max_size=40,
)  # fmt: skip


class WantedError(Exception):
    pass


def failing(text: str) -> Callable[[Connection], None]:
    def change(connection: Connection) -> None:
        note(text)(connection)
        raise WantedError(text)

    return change


async def interleave(url: str, steps: list[Step]) -> None:
    expected: list[str] = []
    futures: list[tuple[bool, asyncio.Future[None]]] = []  # whether it is to succeed
    async with noted(url) as database:
        await database.write(lambda connection: connection.execute(delete(NOTES)))
        for number, step in enumerate(steps):
            text = f"n{number}"
            if step == "yield":
                await asyncio.sleep(0.0005)
                continue
            fails = step.endswith("fails")
            change = failing(text) if fails else note(text)
            if step.startswith("record"):
                futures.append((not fails, database.record(change)))
            else:
                futures.append((not fails, asyncio.ensure_future(database.write(change))))
                await asyncio.sleep(0)  # the task has asked for it
            if step == "record twice":
                futures.append((False, database.record(change)))
            if not fails:
                expected.append(text)
        await asyncio.gather(*(future for _, future in futures), return_exceptions=True)
        assert [future.exception() is None for _, future in futures] == [ok for ok, _ in futures]
        assert await database.read(notes) == expected


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_interleaving_keeps_order_on_sqlite(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(interleave(f"sqlite:///{folder}/test.sqlite3", steps))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS)
def test_any_interleaving_keeps_order_on_postgresql(postgres_url: str, steps: list[Step]) -> None:
    asyncio.run(interleave(postgres_url, steps))
