"""Popularity of adapters: the choice of a request's adapter in tests and benchmarks.

    identical  every request on the first adapter
    distinct   request i on adapter i mod n: neighbours never share one while n allows
    uniform    each adapter equally likely
    zipf       the k-th adapter with probability proportional to 1/k
    skewed     one adapter in five (at least one) takes four requests in five

A choice depends on (seed, request index) alone, so it is the same in any order and process.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

PopularityName = Literal["identical", "distinct", "uniform", "zipf", "skewed"]
POPULARITIES: tuple[PopularityName, ...] = get_args(PopularityName)

HOT_SHARE = 0.2  # share of the adapters, in "skewed" …
HOT_REQUESTS = 0.8  # … that get this share of the requests


def weights(name: PopularityName, count: int) -> list[float]:
    """The probability of each of `count` adapters; they sum to 1.

    Raises:
        ValueError: no adapters, or a name that is none of POPULARITIES.
    """
    if count < 1:
        raise ValueError(f"popularity {name!r} needs at least one adapter, got {count}")
    match name:
        case "identical":
            return [1.0] + [0.0] * (count - 1)
        case "distinct" | "uniform":
            return [1 / count] * count
        case "zipf":
            total = sum(1 / k for k in range(1, count + 1))
            return [1 / k / total for k in range(1, count + 1)]
        case "skewed":
            return _skewed(count)
        case _:
            raise ValueError(f"popularity {name!r} is none of {', '.join(POPULARITIES)}")


def _skewed(count: int) -> list[float]:
    hot = max(1, round(count * HOT_SHARE))
    cold = count - hot
    if cold == 0:
        return [1 / count] * count
    return [HOT_REQUESTS / hot] * hot + [(1 - HOT_REQUESTS) / cold] * cold


@dataclass(frozen=True)
class Popularity:
    """Request index → adapter index, for `count` adapters."""

    name: PopularityName
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        weights(self.name, self.count)  # refuses what it can't draw from, once and here

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(accumulate(weights(self.name, self.count)))

    def adapter(self, request: int) -> int:
        """The adapter of request number `request`, from 0 to count - 1."""
        if self.name == "identical":
            return 0
        if self.name == "distinct":
            return request % self.count
        draw = random.Random(f"popularity {self.seed} {request}").random()
        # rounding can leave the last sum a little under 1
        return min(bisect_right(self._cumulative, draw), self.count - 1)
