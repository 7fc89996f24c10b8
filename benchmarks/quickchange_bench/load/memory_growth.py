"""Memory growth of a server: samples of each of its processes over time.

Knows nothing of requests or adapters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from quickchange_bench.load.process_usage import memory
from quickchange_bench.report_tables import MEBI, number, table
from quickchange_bench.summary_stats import slope

SAMPLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory of one process over the measured time, in bytes; slopes in bytes a minute."""

    process: str
    pid: int
    rss_first: int
    rss_last: int
    rss_peak: int
    rss_slope: float | None
    pss_slope: float | None
    seconds: tuple[float, ...]
    rss: tuple[int, ...]
    pss: tuple[int | None, ...]


@dataclass(slots=True)
class Samples:
    """Memory readings of a process tree, process by process."""

    started: float = field(default_factory=time.monotonic)
    names: dict[int, str] = field(default_factory=dict)
    readings: dict[int, list[tuple[float, int, int | None]]] = field(default_factory=dict)

    def take(self, pid: int) -> None:
        for process in memory(pid):
            now = time.monotonic() - self.started
            self.names[process.pid] = process.name
            reading = (now, process.rss, process.pss)
            self.readings.setdefault(process.pid, []).append(reading)

    def growth(self) -> tuple[Growth, ...]:
        return tuple(self._growth(pid, readings) for pid, readings in self.readings.items())

    def _growth(self, pid: int, readings: list[tuple[float, int, int | None]]) -> Growth:
        times, rss, pss = (tuple(column) for column in zip(*readings, strict=True))
        minutes = [t / 60 for t in times]
        known = [(m, p) for m, p in zip(minutes, pss, strict=True) if p is not None]
        return Growth(
            process=self.names[pid],
            pid=pid,
            rss_first=rss[0],
            rss_last=rss[-1],
            rss_peak=max(rss),
            rss_slope=slope(minutes, rss),
            pss_slope=slope([m for m, _ in known], [p for _, p in known]),
            seconds=times,
            rss=rss,
            pss=pss,
        )


async def sample_forever(pid: int, samples: Samples) -> None:
    """Take a sample each SAMPLE_SECONDS until cancelled."""
    while True:
        await asyncio.to_thread(samples.take, pid)
        await asyncio.sleep(SAMPLE_SECONDS)


def growth_table(growth: Sequence[Growth]) -> str:
    return table(
        ("process", "RSS first MiB", "last MiB", "peak MiB", "RSS MiB/min", "PSS MiB/min"),
        [
            [
                f"{g.process} ({g.pid})",
                number(g.rss_first, 0, 1 / MEBI),
                number(g.rss_last, 0, 1 / MEBI),
                number(g.rss_peak, 0, 1 / MEBI),
                number(g.rss_slope, 2, 1 / MEBI),
                number(g.pss_slope, 2, 1 / MEBI),
            ]
            for g in growth
        ],
    )
