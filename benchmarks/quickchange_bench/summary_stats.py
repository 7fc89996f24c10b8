"""Statistics that the reports share. Knows nothing of servers or requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-th percentile, 0 ≤ q ≤ 100, linear between ranks (numpy's default); None of nothing."""
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is outside 0 to 100")
    ordered = sorted(values)
    if not ordered:
        return None
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median_of(values: Iterable[float | None]) -> float | None:
    """Median of the measured values; None where there are none."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median: how far repeats lie apart. None of fewer than two."""
    if len(values) < 2 or median(values) == 0:
        return None
    return (max(values) - min(values)) / median(values)


def slope(times: Sequence[float], values: Sequence[float]) -> float | None:
    """Least-squares slope of values over times; None where the times do not differ."""
    if len(times) != len(values):
        raise ValueError(f"{len(times)} times for {len(values)} values")
    if len(times) < 2:
        return None
    mean_time, mean_value = fmean(times), fmean(values)
    variance = math.fsum((t - mean_time) ** 2 for t in times)
    if variance == 0:
        return None
    covariance = math.fsum(
        (t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True)
    )
    return covariance / variance


def ratio(value: float | None, reference: float | None) -> float | None:
    """value / reference, where both were measured and the reference is not 0."""
    if value is None or not reference:
        return None
    return value / reference
