"""A counter of limits behind a wire that is slow, loses messages, and whose counter dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal

from quickchange_server.tenants.limit_counter import LimitCounter, LimitMessage, Reply
from quickchange_server.tenants.limits import Clock

Fate = Literal["arrives", "lost", "answer lost", "refused"]


@dataclass(frozen=True)
class Passage:
    """What happens to one message, with the seconds that it takes there and back."""

    fate: Fate = "arrives"
    there: float = 0.0
    back: float = 0.0


@dataclass
class Place:
    """Where the counter lives. `counter` is None while it is dead."""

    clock: Clock = time.monotonic_ns
    counter: LimitCounter | None = None
    lives: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)  # servers in threads of their own

    def begin(self) -> None:
        self.counter = LimitCounter(self.clock)
        self.lives += 1


@dataclass
class Wire:
    """One replica's way to the counter. Without `passages` all messages arrive at once."""

    place: Place
    passages: Iterator[Passage] = field(default_factory=lambda: repeat(Passage()))
    cut: bool = False

    async def exchange(self, message: LimitMessage) -> Reply:
        passage = next(self.passages)
        await asyncio.sleep(passage.there)
        if self.cut or passage.fate == "lost":
            await asyncio.sleep(1000)
        with self.place.turn:
            if self.place.counter is None or passage.fate == "refused":
                raise ConnectionError("the actor died")
            life = self.place.lives
            reply = self.place.counter.exchange(message)
        await asyncio.sleep(passage.back)
        if passage.fate == "answer lost":
            await asyncio.sleep(1000)
        if life != self.place.lives:
            raise ConnectionError("the actor died")
        return reply
