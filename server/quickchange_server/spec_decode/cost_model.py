"""Cost model of steps and of drafting, in seconds, measured and kept current; and its stopwatches.

Machines are noisy in two ways: a single step may take five times as long, and everything may be
slower for a minute. Neither says anything about the price of a row. So a step's cost is a shape
over row counts, corrected slowly, times a level, which follows the machine within some twenty
steps; and no single observation moves either far. Knows nothing of what rows are for.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import exp, log
from statistics import median
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression


class Stopwatch(Protocol):
    """Measures the time between points of a step as the device passes them."""

    def mark(self) -> None:
        """Note the time at which the device gets here."""
        ...

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next. The device must have passed the last one."""
        ...


class HostStopwatch:
    """Stopwatch for a device whose work is done when the call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class CudaStopwatch:
    """Stopwatch for a device that the host runs ahead of: events among the work."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        return [
            before.elapsed_time(after) / 1e3
            for before, after in zip(self._marks, self._marks[1:], strict=False)
        ]


def stopwatch(device: torch.device) -> Stopwatch:
    """A stopwatch that suits the device."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()


LEVEL_RATE = 0.1  # part of a step's deviation that the level follows
LEVEL_CLIP = log(1.5)  # largest deviation believed of one step
SHAPE_RATE = 0.005  # part of a step's deviation from the level that its points follow
SHAPE_CLIP = log(1.2)
REMAKE = 8  # corrections of the shape, 0.1 % each at most, that a table leaves out

DRAFT_DECAY = 0.98  # factor on the weight of earlier calls, per call
DRAFT_RIDGE = 1.001  # decides between pass and draft where the calls don't
DRAFT_CLIP = 2.0  # most that is believed of one call, in estimates of it


class StepCost:
    """Seconds of a step by its rows: never less for more rows, linear between measured counts.

    `points` are (rows, seconds) of steps measured ahead, in any order, several of the same rows at
    will; at least two distinct row counts. Raises ValueError where they are too few or not above 0.
    """

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        measured = sorted(points)
        if any(rows < 1 or seconds <= 0 for rows, seconds in measured):
            raise ValueError(f"points: rows and seconds must be above 0, not {measured}")
        medians = [
            (rows, median(seconds for _, seconds in group))
            for rows, group in groupby(measured, key=lambda point: point[0])
        ]
        if len(medians) < 2:
            raise ValueError("points: measure steps of at least two different row counts")
        self._rows = [rows for rows, _ in medians]
        self._shape: list[float] = isotonic_regression([s for _, s in medians]).x.tolist()
        self._level = 1.0  # slowness of the machine, relative to when the points were measured
        # Seconds of 0, 1, … rows at level 1; empty: to be made.
        self._table: NDArray[np.float64] = np.empty(0)
        self._corrections = 0  # of the shape since the table was made

    def seconds(self, rows: int) -> float:
        """Present cost of a step of `rows` rows."""
        if rows >= len(self._table):
            self.table(rows)
        return float(self._table[rows]) * self._level

    def table(self, rows: int) -> NDArray[np.float64]:
        """Seconds [rows + 1] of steps of 0, 1, …, `rows` rows.

        Below the lowest measured count a step costs as much as there; beyond the highest, the last
        two counts' slope goes on.
        """
        if rows >= len(self._table):
            self._table = self._made_table(max(rows, self._rows[-1]))
        return self._table[: rows + 1] * self._level

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step of `rows` rows that took `seconds`."""
        deviation = log(seconds / self.seconds(rows))
        self._level *= exp(LEVEL_RATE * _clipped(deviation, LEVEL_CLIP))
        self._correct(rows, SHAPE_RATE * _clipped(deviation, SHAPE_CLIP))

    def _correct(self, rows: int, by: float) -> None:
        """Scale the shape around `rows` by exp(by), and the rest only to keep it in order."""
        after = bisect_left(self._rows, rows)
        before = max(after - 1, 0)
        after = min(after, len(self._rows) - 1)
        span = self._rows[after] - self._rows[before]
        share = min((rows - self._rows[before]) / span, 1.0) if span else 1.0
        shape = self._shape
        for point, weight in ((before, 1 - share), (after, share)):
            own = shape[point] = shape[point] * exp(by * weight)
            shape[:point] = [min(seconds, own) for seconds in shape[:point]]
            shape[point:] = [max(seconds, own) for seconds in shape[point:]]
        self._corrections += 1
        if self._corrections == REMAKE:
            self._table, self._corrections = np.empty(0), 0

    def _made_table(self, rows: int) -> NDArray[np.float64]:
        counts = np.arange(rows + 1)
        table: NDArray[np.float64] = np.interp(counts, self._rows, self._shape)
        last = self._rows[-1]
        slope = (self._shape[-1] - self._shape[-2]) / (last - self._rows[-2])
        table[last:] += slope * (counts[last:] - last)
        return table


class DraftCost:
    """Seconds of a drafting call: a price per pass and a price per draft.

    A call that drafts to depth d makes d passes; sequences that want fewer leave the later ones.
    The cost is 0 until a call was observed, so that a first one is made.
    """

    def __init__(self) -> None:
        self._pass_pass = self._pass_draft = self._draft_draft = 0.0  # decayed sums of products
        self._pass_seconds = self._draft_seconds = 0.0
        self._price = (0.0, 0.0)  # seconds of a pass, of a draft

    def seconds(self, depths: Sequence[int]) -> float:
        """Cost of a call that drafts `depths` tokens for each sequence."""
        a_pass, a_draft = self._price
        return a_pass * max(depths, default=0) + a_draft * sum(depths)

    def observe(self, depths: Sequence[int], seconds: float) -> None:
        """Learn from a call that drafted `depths` tokens for each sequence, some above 0."""
        passes, drafts = max(depths), sum(depths)
        thought = self.seconds(depths)
        if thought:
            seconds = min(seconds, DRAFT_CLIP * thought)
        self._pass_pass = DRAFT_DECAY * self._pass_pass + passes * passes
        self._pass_draft = DRAFT_DECAY * self._pass_draft + passes * drafts
        self._draft_draft = DRAFT_DECAY * self._draft_draft + drafts * drafts
        self._pass_seconds = DRAFT_DECAY * self._pass_seconds + passes * seconds
        self._draft_seconds = DRAFT_DECAY * self._draft_seconds + drafts * seconds
        self._price = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        """The least-squares prices, neither below 0.

        Calls all alike leave open which of the two the time goes to: then it is the passes', so
        that more sequences are tried rather than thought too dear by calls of one.
        """
        draft_draft = self._draft_draft * DRAFT_RIDGE
        determinant = self._pass_pass * draft_draft - self._pass_draft**2
        a_pass = self._pass_seconds * draft_draft - self._draft_seconds * self._pass_draft
        a_draft = self._draft_seconds * self._pass_pass - self._pass_seconds * self._pass_draft
        if a_pass < 0:
            return 0.0, self._draft_seconds / self._draft_draft
        if a_draft < 0:
            return self._pass_seconds / self._pass_pass, 0.0
        return a_pass / determinant, a_draft / determinant


def _clipped(deviation: float, most: float) -> float:
    return max(-most, min(deviation, most))
