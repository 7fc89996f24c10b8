"""sample: one token from each row of logits, with nothing brought to the host.

Edits come first, then the draw. With mass(i) = ⌊2⁴² · exp((lᵢ − max l) / temperature)⌋, an integer:

    edits         lᵢ + value; value; lᵢ · value where lᵢ < 0, else lᵢ / value; lᵢ − value (EDITS)
    temperature   0: the first of the best logits
    top_k         keeps lᵢ >= the k-th best logit
    top_p         keeps mass >= the greatest m for which the masses >= m hold top_p of all (of those
                  that top_k left)
    min_p         keeps mass >= min_p · 2⁴²
    typical_p     keeps |depth − D| <= the least r for which these hold typical_p of all (of those
                  that the filters before left), where depth(i) = ⌊−2¹⁶ · log₂ exp((lᵢ − max l) /
                  temperature)⌋ and D, a whole number, is the mean depth under the masses (Meister
                  et al. 2022: depth − D is a token's surprisal less the entropy, in 2⁻¹⁶ bits)
    the token     the first i whose running sum of kept masses exceeds ⌊uniform · their sum⌋

Integers add up to the same sum in any order, and a mass is made of float32 steps that IEEE 754
fixes to the bit (`sample_plain.masses` has them; no step may be fused with the next). So a row's
token is the same on every device and in every version, in any batch, and in any division of the
work. Filters are thresholds: tokens that tie at the edge are kept or dropped together. Cutting a
mass at 2⁻⁴² of the best token's takes at most 2⁻²⁴ of the whole from a vocabulary of 2¹⁸.

Contract
    logits      [R, V]  float32, bfloat16 or float16; rows contiguous (any row stride), V <= 2²⁰.
                        Edits are made in place where they are float32, else in a copy
    temperature, uniform and each of FILTERS  float64 [R]
                        uniform in [0, 1); top_k of 0, or of V and more, is off, as are top_p and
                        typical_p >= 1 and min_p <= 0. A filter that no row uses is None, and costs
                        nothing
    returns     tokens int64 [R], sound bool [R]. A row with NaN or +inf, or whose logits are all
                -inf after the edits, is not sound, and its token is 0; other rows don't notice
Edits out of range raise IndexError on a CPU, before any is made; on a GPU they must not occur.
Knows nothing of sequences or penalties.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.sampling.sample_plain import MAX_VOCABULARY, plain_sample

EDITS = ("add", "set", "scale", "subtract")  # in the order in which they are made


@dataclass(frozen=True)
class Edits:
    """Changes to single logits: entries begin[4 r + k] : begin[4 r + k + 1] are row r's of kind k.

    The kinds are EDITS; a token stands at most once in a row's kind. Entries past begin[-1] are
    padding.
    """

    begin: Tensor  # int32 [4 R + 1]
    token: Tensor  # int32 [E]
    value: Tensor  # float32 [E]


@dataclass(frozen=True)
class Draws:
    """Temperature, random number and filters of each row; `Draws()` takes all rows' best logits."""

    temperature: Tensor | None = None  # float64 [R]; None: 0 in all rows
    uniform: Tensor | None = None  # float64 [R]; there exactly where temperature is
    top_k: Tensor | None = None  # float64 [R], as all filters; whole numbers
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None

    @property
    def filters(self) -> list[Tensor | None]:
        """The filters in the order of FILTERS, as every version takes them."""
        return [getattr(self, name) for name in FILTERS]


_COLUMNS = tuple(field.name for field in fields(Draws))
FILTERS = _COLUMNS[2:]  # in the order in which they are passed and applied


class Drawn(NamedTuple):
    """Tokens that `sample` drew, and which rows were sound."""

    tokens: Tensor  # int64 [R]
    sound: Tensor  # bool [R]


def _fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.bool)


_sample = dispatch.declare(
    "sample",
    "(Tensor(a!) logits, Tensor? temperature, Tensor? uniform, Tensor?[] filters, "
    "Tensor? edit_begin, Tensor? edit_token, Tensor? edit_value) -> (Tensor, Tensor)",
    plain_sample,
    _fake,
)
dispatch.triton_version("sample", "quickchange_kernels.sampling.sample_triton:launch_sample")


def sample(logits: Tensor, draws: Draws, edits: Edits | None = None) -> Drawn:
    """One token a row, on the logits' device. Contract above; ValueError where it is broken."""
    check(logits, draws, edits)
    native.ensure()
    changes = (None, None, None) if edits is None else (edits.begin, edits.token, edits.value)
    return Drawn(*_sample(logits, draws.temperature, draws.uniform, draws.filters, *changes))


def check(logits: Tensor, draws: Draws, edits: Edits | None) -> None:
    """Raise ValueError for shapes and dtypes that the contract does not have."""
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCABULARY or logits.stride(1) != 1:
        raise ValueError(
            f"sample: logits of shape {tuple(logits.shape)} and strides {logits.stride()}; they "
            f"must be [R, V] with contiguous rows and 1 <= V <= {MAX_VOCABULARY}"
        )
    if (draws.temperature is None) != (draws.uniform is None):
        raise ValueError("sample: temperature and uniform must be given together")
    for name in _COLUMNS:
        value: Tensor | None = getattr(draws, name)
        if value is not None and (value.dtype != torch.float64 or value.shape != logits.shape[:1]):
            raise ValueError(
                f"sample: {name} is {value.dtype} {tuple(value.shape)}; it must be torch.float64 "
                f"[{logits.shape[0]}]"
            )
    if edits is not None and edits.begin.shape != (len(EDITS) * logits.shape[0] + 1,):
        raise ValueError(
            f"sample: edits.begin has shape {tuple(edits.begin.shape)}; {logits.shape[0]} rows "
            f"need [{len(EDITS) * logits.shape[0] + 1}]"
        )
