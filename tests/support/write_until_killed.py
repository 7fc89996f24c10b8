"""Writes and records notes for ever, and prints each that is acknowledged: python … URL LABEL."""

from __future__ import annotations

import asyncio
import itertools
import sys
from functools import partial

from storage_support import note

from quickchange_server.storage.database import Database


async def main(url: str, label: str) -> None:
    database = await asyncio.to_thread(Database.open, url)
    for number in itertools.count():
        texts = [f"{label}-{number}-{index}" for index in range(20)]
        records = {text: database.record(note(text)) for text in texts}
        for text, future in records.items():
            future.add_done_callback(partial(say, text))
        if number % 5 == 0:
            await database.write(note(f"{label}-{number}-written"))
            print(f"{label}-{number}-written", flush=True)
        await asyncio.sleep(0.002)


def say(text: str, done: asyncio.Future[None]) -> None:
    done.result()
    print(text, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
