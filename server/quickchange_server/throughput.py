"""How soon a refused client should come back, from how fast requests have ended lately."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0
WINDOW_REQUESTS = 256
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 60.0
UNKNOWN_SECONDS = 5.0  # nothing has ended lately: a guess
FREED_SHARE = 0.1  # of the queue, before it makes sense to come back: many others come too


class Throughput:
    """Times at which the last requests ended, in monotonic seconds."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=WINDOW_REQUESTS)

    def ended(self, now: float) -> None:
        self._ends.append(now)

    def retry_after(self, queue_length: int, now: float) -> float:
        """Seconds until a share of a queue of `queue_length` is free, at the recent rate."""
        while self._ends and now - self._ends[0] > WINDOW_SECONDS:
            self._ends.popleft()
        if not self._ends:
            return UNKNOWN_SECONDS
        seconds_per_request = max(now - self._ends[0], SHORTEST_SECONDS) / len(self._ends)
        wanted = max(1.0, FREED_SHARE * queue_length) * seconds_per_request
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, wanted))
