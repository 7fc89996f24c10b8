"""Confidence sequences: intervals that hold at all times at once, however often one looks.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
"Time-uniform central limit theory and asymptotic confidence sequences" (Annals of Statistics,
2024; arXiv 2103.06476), which is Robbins' normal mixture with an estimated variance. In the
writing of Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences" (Annals of Statistics, 2021), with intrinsic time v and mixing rho:

    |S(v)| < sqrt((v + rho) * log((v + rho) / (rho * alpha^2)))    for all v, with 1 - alpha.

Here v counts units and S / v is the estimate over its standard error times sqrt(v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

from quickchange_server.experiments.statistics.moments import Floats, Moments, pooled, ratio


@dataclass(frozen=True)
class Estimate:
    """An estimate with what its confidence sequence needs. All of one shape."""

    value: Floats
    error: Floats  # standard error
    units: Floats  # the clock: proportional to information, in units of one variant


def best_mixing(units: float, alpha: float) -> float:
    """The rho whose interval is narrowest near `units`: Howard et al. (2021), section 3.5, in the
    closed form that Waudby-Smith et al. (2024) give."""
    threshold = -2 * math.log(alpha)
    return units / (threshold + math.log1p(threshold))


def log_evidence(estimate: Estimate, rho: float) -> Floats:
    """log of the mixture martingale against an estimand of zero; its exp has mean 1 or less."""
    z = ratio(estimate.value, estimate.error)
    units = estimate.units
    weight = units / (units + rho)
    return np.asarray(0.5 * (weight * z**2 - np.log1p(units / rho)))


def p_value(estimate: Estimate, rho: float) -> Floats:
    """Always-valid p-value that the estimand is zero: a rejection below alpha errs with alpha at
    most, whenever and for whatever reason one stopped there."""
    return np.asarray(np.exp(np.minimum(-log_evidence(estimate, rho), 0.0)))


def half_width(estimate: Estimate, alpha: float, rho: float) -> Floats:
    """Half the width of the 1 - `alpha` confidence sequence; it excludes zero where the p-value
    is below `alpha`, and only there."""
    units = estimate.units
    spread = 1 + ratio(np.full_like(units, rho), units)
    factor = spread * (np.log1p(units / rho) - 2 * math.log(alpha))
    return np.asarray(estimate.error * np.sqrt(factor))


def means(moments: Moments) -> Estimate:
    """Of each variant's mean. [..., V]"""
    return Estimate(
        moments.mean, np.sqrt(ratio(moments.working_variance, moments.count)), moments.count
    )


def differences(strata: Sequence[Moments]) -> Estimate:
    """Of each variant's mean less the control's. [..., V - 1]

    A stratum is a stretch of constant weights. Differences are taken within strata and weighted by
    their information: where a ramp has changed the shares while outcomes drifted, means of all
    units would differ without any effect (Simpson's paradox). The variances are those of all units
    together, which is safe, and steady where a stratum is small.

    The clock is the units that two variants of equal size would need for the same standard error.
    It stays proportional to the information when weights change; the number of units would not,
    and the bound would no longer be a bound.
    """
    variance = pooled(strata).working_variance
    information = np.array([_information(part, variance) for part in strata])  # [S, ..., V - 1]
    within = np.array([part.mean[..., 1:] - part.mean[..., :1] for part in strata])
    total = np.sum(information, axis=0)
    weighted = np.sum(information * np.nan_to_num(within), axis=0)
    return Estimate(
        ratio(weighted, total),
        np.sqrt(ratio(np.ones_like(total), total)),
        (variance[..., 1:] + variance[..., :1]) * total,
    )


def _information(stratum: Moments, variance: Floats) -> Floats:
    """1 over the squared standard error of each difference; 0 where it isn't known. [..., V - 1]"""
    of_mean = ratio(variance, stratum.count)
    squared = of_mean[..., 1:] + of_mean[..., :1]
    return np.nan_to_num(ratio(np.ones_like(squared), squared))


_TINY = 1e-12  # nearer than this to 0 or 1 is there
_CLOSE = 1e-15  # of an end: rare flags' ends lie near 0


def proportion_interval(total: float, count: float, alpha: float) -> tuple[float, float]:
    """The proportions that `total` of `count` leaves possible. `count` may be 0.

    The beta-binomial mixture (Robbins 1970; the two-category case of Lindon and Malek,
    "Anytime-valid inference for multinomial count data", NeurIPS 2022), exact at every sample size:
    a proportion p is left out once a uniform mixture of proportions has explained the data
    1 / alpha times better. It holds for any values between 0 and 1, since
    x -> a^x * b^(1 - x) is convex (Hoeffding 1963).
    """
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
