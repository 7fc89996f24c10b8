"""Plain torch version of sample, for any device; see sample_contract.py. Filters sort the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickchange_kernels.index_checks import check_indices, check_ranges

MASS_BITS = 42
MAX_VOCABULARY = 2**20  # so that the sum of all masses fits in 63 bits
SMALLEST_TEMPERATURE = 1e-30  # below it, dividing a logit by it could overflow
LOG2_E = 1.44269504
ROUNDER = 12582912.0  # 1.5 · 2²³: adding and subtracting it rounds to the nearest integer
# 2ᶠ = 1 + f (c0 + f (c1 + ...)) for |f| <= 1/2, interpolated at Chebyshev nodes: 1e-7 off at most
EXP2 = (
    0.6931471824645996,
    0.24022650718688965,
    0.055503569543361664,
    0.009618056938052177,
    0.0013390866806730628,
    0.00015461447765119374,
)
DEPTH_UNIT = 65536.0  # depths in one bit
_LIMB = 21  # bits of half a mass: products with depths, of either half, add up within 63
_LOWEST = -64.0  # log2 of a weight whose mass is 0
_KINDS = 4  # kinds of edits


def plain_sample(
    logits: Tensor,
    temperature: Tensor | None,
    uniform: Tensor | None,
    filters: Sequence[Tensor | None],
    edit_begin: Tensor | None,
    edit_token: Tensor | None,
    edit_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sample in plain torch, for any device; arguments as in its schema."""
    logits = logits.float()
    if edit_begin is not None and edit_token is not None and edit_value is not None:
        edit_(logits, edit_begin, edit_token, edit_value)
    best = logits.argmax(dim=-1)  # the first of equals; a NaN wins every comparison
    peak = logits.gather(1, best[:, None])
    sound = peak.isfinite().squeeze(1)
    tokens = best
    if temperature is not None and uniform is not None:
        kept = kept_masses(logits, peak, temperature, *filters)
        tokens = torch.where(temperature > 0, inverse_cdf(kept, uniform), best)
    return torch.where(sound, tokens, 0), sound


def edit_(logits: Tensor, begin: Tensor, token: Tensor, value: Tensor) -> None:
    """Make the edits in place on float32 logits [R, V]."""
    check_ranges("sample: edits.begin", torch.stack([begin[:-1], begin[1:]], 1), len(token))
    check_indices("sample: edits.token", token[int(begin[0]) : int(begin[-1])], logits.shape[1])
    lengths = (begin[1:] - begin[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=logits.device), lengths)
    token, value = token[begin[0] :][: len(owner)].long(), value[begin[0] :][: len(owner)]
    for kind in range(_KINDS):
        chosen = (owner % _KINDS == kind).nonzero().squeeze(1)
        at = (owner[chosen] // _KINDS, token[chosen])
        logits[at] = _edited(kind, logits[at], value[chosen])


def _edited(kind: int, now: Tensor, value: Tensor) -> Tensor:
    if kind == 0:
        return now + value
    if kind == 1:
        return value
    if kind == 2:
        return torch.where(now < 0, now * value, now / value)
    return now - value


def powers(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """float32 [R, V]: log2 of each token's weight beside the best's, at least -64.

    Rounded as `masses` says.
    """
    scale = temperature.float().clamp(min=SMALLEST_TEMPERATURE)[:, None]
    power = (logits - peak) / scale
    power = power * LOG2_E
    return torch.where((power > _LOWEST) & (power <= 0), power, _LOWEST)


def masses(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """int64 [R, V] of float32 logits [R, V], their best [R, 1] and float64 temperatures [R].

    Every line is one float32 operation, rounded as IEEE 754 says: other versions give these bits.
    """
    power = powers(logits, peak, temperature)
    whole = power + ROUNDER
    whole = whole - ROUNDER
    part = power - whole
    value = torch.full_like(part, EXP2[-1])
    for coefficient in reversed(EXP2[:-1]):
        value = value * part
        value = value + coefficient
    value = value * part
    value = value + 1.0
    # exact: a power of two, then the integer below
    exponent = (whole.int() + (127 + MASS_BITS)) << 23
    return (value * exponent.view(torch.float32)).long()


def kept_masses(
    logits: Tensor,
    peak: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
) -> Tensor:
    """int64 [R, V]: the masses of what the filters keep, 0 elsewhere."""
    mass = masses(logits, peak, temperature)
    if top_k is not None:
        mass.masked_fill_(logits < kth_best(logits, top_k), 0)
    least = torch.ones_like(temperature, dtype=torch.int64)
    if top_p is not None:
        least = nucleus_edge(mass, top_p)
    if min_p is not None:
        whole = 2**MASS_BITS
        least = torch.maximum(least, (min_p * whole).long().clamp(max=whole))
    mass.masked_fill_(mass < least[:, None], 0)
    if typical_p is not None:
        depth = (powers(logits, peak, temperature) * -DEPTH_UNIT).long()
        mass.masked_fill_(~typical(mass, depth, typical_p), 0)
    return mass


def kth_best(logits: Tensor, top_k: Tensor) -> Tensor:
    """[R, 1]: the k-th best logit of each row, -inf where the filter is off."""
    size = logits.shape[1]
    off = (top_k <= 0) | (top_k >= size)
    ordered = logits.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (top_k - 1).clamp(0, size - 1).long()[:, None])
    return kth.masked_fill(off[:, None], float("-inf"))


def nucleus_edge(mass: Tensor, top_p: Tensor) -> Tensor:
    """int64 [R]: the greatest m for which the masses >= m hold top_p of all; 1 where it is off."""
    ordered = mass.sort(dim=-1, descending=True).values
    running = ordered.cumsum(dim=-1)
    wanted = (running[:, -1].double() * top_p).long().clamp(min=1)
    before = (running < wanted[:, None]).sum(dim=-1, keepdim=True)
    edge = ordered.gather(1, before.clamp(max=mass.shape[1] - 1)).squeeze(1)
    return torch.where(top_p < 1, edge, 1)


def typical(mass: Tensor, depth: Tensor, typical_p: Tensor) -> Tensor:
    """bool [R, V]: True for the depths nearest to the mean depth that hold typical_p of all mass.

    True everywhere in rows where the filter is off. mass, depth int64 [R, V].
    """
    total = mass.sum(dim=-1)
    high = ((mass >> _LIMB) * depth).sum(dim=-1).double() * 2**_LIMB
    low = ((mass & (2**_LIMB - 1)) * depth).sum(dim=-1).double()
    mean = ((high + low) / total.double()).long()
    away = (depth - mean[:, None]).abs()
    ordered = away.sort(dim=-1)
    running = mass.gather(1, ordered.indices).cumsum(dim=-1)
    wanted = (total.double() * typical_p).long().clamp(min=1)
    before = (running < wanted[:, None]).sum(dim=-1, keepdim=True)
    edge = ordered.values.gather(1, before.clamp(max=mass.shape[1] - 1))
    close: Tensor = away <= edge
    return close | (typical_p >= 1)[:, None]


def inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """int64 [R]: the first token whose running sum of masses exceeds ⌊uniform · their sum⌋."""
    running = mass.cumsum(dim=-1)
    total = running[:, -1]
    # a uniform of 1, which the contract does not have, stays in the row
    target = torch.minimum((total.double() * uniform).long(), total - 1)
    return torch.searchsorted(running, target[:, None], right=True).squeeze(1)
