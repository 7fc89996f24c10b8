"""Draws tokens from logits: temperature, top_k, top_p, min_p, inverse CDF in vocabulary order.

One contract, two versions: `draw_batch` in torch for any device, and `draw_row` for the CPU, where
what a filter leaves is some hundred tokens and passes over the whole vocabulary are what costs
(16 rows of 49,152 with top_p 0.9: 10 ms batched, 3 ms by rows, one core). By rows also means that
no parallel region is entered and that a row's result can't depend on the rest of the batch.

Every filter is a threshold, so equal tokens are kept or dropped together: where tokens tie at the
edge of top_k or top_p, all of them stay (transformers does so for top_k, and breaks ties of top_p
by its sort).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_server.messages import SamplingParams

_NEVER = float("-inf")
_SMALLEST_TEMPERATURE = 1e-30  # below it, dividing a logit by it could overflow
_SORTABLE = 2048  # candidates: below, sorting them costs less than dividing them further
_PIVOT_SAMPLE = 63

Floats = npt.NDArray[np.float32]


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """int64 [S]: a token for each row of float32 logits [S, V] (overwritten).

    Every temperature is above 0, every uniform number in [0, 1). A row whose logits are not sound
    (NaN, +inf, or no finite one) gets a token of no meaning, which may be V.
    """
    if logits.device.type != "cpu":
        return draw_batch(logits, params, uniforms)
    table = logits.numpy()
    tokens = [draw_row(*row) for row in zip(table, params, uniforms, strict=True)]
    return torch.tensor(tokens)


def draw_row(logits: Floats, params: SamplingParams, uniform: float) -> int:
    """One row on the CPU; float32 logits [V], overwritten."""
    logits /= np.float32(max(params.temperature, _SMALLEST_TEMPERATURE))
    kept: npt.NDArray[np.intp] | None = None  # tokens left, in vocabulary order; None: all
    if 0 < params.top_k < logits.size:
        best = torch.from_numpy(logits).topk(params.top_k, sorted=False).values
        kept = np.flatnonzero(logits >= best.min().numpy())
        logits = logits[kept]
    if not logits.size:  # NaN
        return 0
    weights = torch.softmax(torch.from_numpy(logits), dim=0).numpy()
    least = nucleus_threshold(weights, params.top_p)
    if params.min_p > 0:
        least = max(least, float(np.float32(params.min_p) * weights.max()))
    if least > 0:
        inside = np.flatnonzero(weights >= least)
        weights = weights[inside]
        kept = inside if kept is None else kept[inside]
    if not weights.size:  # NaN
        return 0
    index = _inverse_cdf(weights, uniform)
    return index if kept is None else int(kept[min(index, kept.size - 1)])


def _inverse_cdf(weights: Floats, uniform: float) -> int:
    """First index whose running sum exceeds uniform · total: never one of weight 0."""
    # float64: a running float32 sum over 50,000 tokens is off by 1e-4 where it ends. NumPy converts
    # (torch would enter a parallel region), torch adds up (100 µs; NumPy's takes 290).
    cumulative = torch.from_numpy(weights.astype(np.float64)).cumsum(0).numpy()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def nucleus_threshold(probabilities: Floats, top_p: float) -> float:
    """The least probability in the smallest set with a mass of at least top_p; 0 keeps all.

    probabilities: float32 [V], summing to 1. Exact without sorting V values: all tokens below
    (1 - top_p) / V weigh less than 1 - top_p together, so the set lies among the others (half of
    that bound, for rounding); where these are still many, they are halved at a pivot first.
    """
    if top_p >= 1:
        return 0.0
    bound = 0.5 * (1.0 - top_p) / probabilities.size
    values = probabilities[np.flatnonzero(probabilities >= bound)]
    missing = top_p  # mass still to be found among `values`
    while values.size > _SORTABLE:
        sample = values[:: values.size // _PIVOT_SAMPLE]
        high = values >= np.median(sample)
        upper = values[np.flatnonzero(high)]
        if upper.size == values.size:  # equal values: nothing to divide
            break
        mass = float(upper.sum(dtype=np.float64))
        if mass >= missing:
            values = upper
        else:
            values = values[np.flatnonzero(~high)]
            missing -= mass
    values = np.sort(values)[::-1]
    index = int(np.searchsorted(np.cumsum(values, dtype=np.float64), missing))
    return float(values[index]) if index < values.size else 0.0


def draw_batch(
    logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> Tensor:
    """All rows at once, on any device, with no transfer to the host."""
    temperatures = [max(p.temperature, _SMALLEST_TEMPERATURE) for p in params]
    if any(t != 1.0 for t in temperatures):
        logits /= _column(temperatures, logits).float()
    _keep_top_k(logits, [p.top_k for p in params])
    probabilities = torch.softmax(logits, dim=-1)
    if any(p.top_p < 1 for p in params):
        least = nucleus_thresholds(probabilities, [p.top_p for p in params])
        probabilities.masked_fill_(probabilities < least, 0.0)
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], logits).float()
        least = probabilities.amax(dim=-1, keepdim=True) * floor
        probabilities.masked_fill_(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = _column(uniforms, logits) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _keep_top_k(logits: Tensor, top_k: Sequence[int]) -> None:
    """Set to -inf what is below the row's k-th best logit; k of 0, or of V and more, is off."""
    active = [i for i, k in enumerate(top_k) if 0 < k < logits.shape[1]]
    if not active:
        return
    wanted = [top_k[i] for i in active]
    rows = torch.tensor(active, device=logits.device)
    best = logits[rows].topk(max(wanted), dim=-1).values
    kth = best.gather(1, torch.tensor(wanted, device=logits.device)[:, None] - 1)
    least = torch.full((len(top_k), 1), _NEVER, device=logits.device)
    least[rows] = kth
    logits.masked_fill_(logits < least, _NEVER)


def nucleus_thresholds(probabilities: Tensor, top_p: Sequence[float]) -> Tensor:
    """[S, 1]: `nucleus_threshold` of every row of [S, V], by sorting."""
    limit = _column(top_p, probabilities)
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = (ordered.cumsum(dim=-1, dtype=torch.float64) < limit).sum(dim=-1, keepdim=True)
    last = ordered.gather(1, before.clamp(max=ordered.shape[1] - 1))
    return torch.where((limit < 1) & (before < ordered.shape[1]), last, 0.0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
