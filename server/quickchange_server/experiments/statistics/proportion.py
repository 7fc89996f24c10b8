"""A confidence sequence for one proportion, exact at every sample size.

The beta-binomial mixture (Robbins 1970; the two-category case of Lindon and Malek, "Anytime-valid
inference for multinomial count data", NeurIPS 2022): a proportion p is left out once a uniform
mixture of proportions has explained the data 1 / alpha times better. It holds for any values
between 0 and 1, since x -> a^x * b^(1 - x) is convex (Hoeffding 1963).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

_TINY = 1e-12  # nearer than this to 0 or 1 is there
_CLOSE = 1e-15  # of an end: rare flags' ends lie near 0


def interval(total: float, count: float, alpha: float) -> tuple[float, float]:
    """The proportions that `total` of `count` leaves possible. `count` may be 0."""
    rest = count - total
    level = float(betaln(total + 1, rest + 1)) + math.log(alpha)

    def left_out(p: float) -> float:  # above zero: left out
        return level - float(xlogy(total, p) + xlog1py(rest, -p))

    peak = total / count if count else 0.5
    lower, upper = 0.0, 1.0
    if left_out(_TINY) > 0:
        lower = float(brentq(left_out, _TINY, peak, xtol=_CLOSE))
    if left_out(1 - _TINY) > 0:
        upper = float(brentq(left_out, peak, 1 - _TINY, xtol=_CLOSE))
    return lower, upper
