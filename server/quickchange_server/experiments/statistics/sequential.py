"""Confidence sequences: intervals that hold at all times at once, however often one looks.

Means and differences have the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha,
Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (Annals
of Statistics, 2024; arXiv 2103.06476), which is Robbins' normal mixture with an estimated
variance. In the notation of Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric,
nonasymptotic confidence sequences" (Annals of Statistics, 2021), with intrinsic time v and mixing
rho, with probability 1 - alpha:

    |S(v)| < sqrt((v + rho) * log((v + rho) / (rho * alpha^2)))    for all v.

Here v counts units and S / v is the estimate over its standard error times sqrt(v). Proportions
have an exact sequence, by the beta-binomial mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quickchange_server.experiments.statistics.moments import Floats, Moments, pooled, ratio

_TINY = 1e-12  # proportions closer than this to 0 or 1 are not resolved
_CLOSE = 1e-15  # absolute tolerance of an interval's ends, which lie near 0 for rare flags


@dataclass(frozen=True)
class Estimate:
    """An estimate, its standard error and its intrinsic time, all of one shape."""

    value: Floats
    error: Floats  # standard error
    units: Floats  # intrinsic time: proportional to information, in units of one variant


def best_mixing(units: float, alpha: float) -> float:
    """The mixing rho with the narrowest interval near `units`: Howard et al. (2021), section 3.5,
    in the closed form of Waudby-Smith et al. (2024)."""
    threshold = -2 * math.log(alpha)
    return units / (threshold + math.log1p(threshold))


def log_evidence(estimate: Estimate, rho: float) -> Floats:
    """Log of the mixture martingale against an estimand of zero; its exp has mean 1 or less."""
    z = ratio(estimate.value, estimate.error)
    units = estimate.units
    weight = units / (units + rho)
    return np.asarray(0.5 * (weight * z**2 - np.log1p(units / rho)))


def p_value(estimate: Estimate, rho: float) -> Floats:
    """Always-valid p-value that the estimand is zero: a rejection below alpha errs with alpha at
    most, whenever and for whatever reason one stopped there."""
    return np.asarray(np.exp(np.minimum(-log_evidence(estimate, rho), 0.0)))


def half_width(estimate: Estimate, alpha: float, rho: float) -> Floats:
    """Half the width of the 1 - `alpha` confidence sequence, which excludes zero if and only if
    the p-value is below `alpha`."""
    units = estimate.units
    spread = 1 + ratio(np.full_like(units, rho), units)
    factor = spread * (np.log1p(units / rho) - 2 * math.log(alpha))
    return np.asarray(estimate.error * np.sqrt(factor))


def means(moments: Moments) -> Estimate:
    """Estimates of each variant's mean. [..., V]"""
    return Estimate(
        moments.mean, np.sqrt(ratio(moments.working_variance, moments.count)), moments.count
    )


def differences(strata: Sequence[Moments]) -> Estimate:
    """Estimates of each variant's mean minus the control's. [..., V - 1]

    A stratum is a stretch of constant weights. Differences are taken within strata and weighted by
    their information: if a ramp changed the shares while outcomes drifted, the means of all units
    would differ without any effect (Simpson's paradox). The variances are those of all units
    together, which is conservative, and stable if a stratum is small.

    The intrinsic time is the number of units that two variants of equal size would need for the
    same standard error. It stays proportional to the information when weights change; the number
    of units would not, and the bound would no longer hold.
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
    """Inverse squared standard error of each difference; 0 if unknown. [..., V - 1]"""
    of_mean = ratio(variance, stratum.count)
    squared = of_mean[..., 1:] + of_mean[..., :1]
    return np.nan_to_num(ratio(np.ones_like(squared), squared))


def proportion_interval(total: float, count: float, alpha: float) -> tuple[float, float]:
    """Confidence sequence for a proportion, given `total` of `count` units. `count` may be 0.

    The beta-binomial mixture (Robbins 1970; the two-category case of Lindon and Malek,
    "Anytime-valid inference for multinomial count data", NeurIPS 2022), exact at every sample size:
    a proportion p is left out if a uniform mixture of proportions explains the data 1 / alpha
    times better. It also holds for values between 0 and 1, since x -> a^x * b^(1 - x) is convex
    (Hoeffding 1963).
    """
    from scipy.optimize import brentq  # as in best.py
    from scipy.special import betaln, xlog1py, xlogy

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
