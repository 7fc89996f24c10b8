"""linear_quantized: y = x Wᵀ + b over int8 or int4 weights in panels, with x quantised on the way.

Contract
    x       [..., K]                  float32, bfloat16 or float16; any strides
    weight  [⌈N / 16⌉, ⌈K / 32⌉, 8, 16, 4]  uint8: a panel of 16 columns, a group of 32 features in
                                      8 steps of 4; int8 is kept 128 higher. int4 has 4 for 8: step
                                      s in the low halves of the bytes, step s + 4 in the high ones
    scale   [⌈N / 16⌉, ⌈K / 32⌉, 16]  bfloat16
    minimum the same                  of int4, else None:
                                      W[n, k] = weight · scale (int8), weight · scale + minimum
    bias    [N]                       x's dtype, or None
    columns N
    returns [..., N]                  new, contiguous, x's dtype

Each row of x is quantised as GGML's Q8_0 does: 32 values share a scale, their largest magnitude
over 127, and become whole numbers, rounded to even. A group's sum of products is a whole number;
groups are multiplied with both scales and added in float32. So a row's result depends on K alone,
not on its batch, and instruction sets differ in how their float32 sums round, no more. A group
whose largest magnitude is under 2⁻¹⁰⁰ counts as zero. A row with a value that is infinite or no
number is NaN throughout.

8.5 and 5 bits a weight. `linear_int8.py` keeps x exact; it is slower (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native
from quickchange_kernels.linear.linear_int8 import GROUP, quantize_int8

PANEL = 16  # columns; also PANEL_COLUMNS in csrc/kernels.h
_STEP = 4  # values of a column in one step
_LARGEST = 127
_LEAST = 2.0**-100  # also LEAST_ACTIVATION in csrc/kernels.h
_OFFSET = 128  # of int8 weights
_ROWS_AT_ONCE = 512  # quantised at once, so that the numbers on the way stay in the cache
_WIDTHS = (-1.0, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8)  # of a step, tried against 15 to the span


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix as `linear_quantized` takes it."""

    weight: Tensor
    scale: Tensor
    minimum: Tensor | None
    columns: int

    @property
    def nbytes(self) -> int:
        least = 0 if self.minimum is None else self.minimum.nbytes
        return self.weight.nbytes + self.scale.nbytes + least


def pack_int8(weight: Tensor) -> PackedWeight:
    """`weight` [N, K] as int8 with a scale per row and group of 32.

    Raises ValueError where a weight is not finite.
    """
    quantized, scale = quantize_int8(weight)
    steps = _steps(F.pad(quantized, (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP))
    return PackedWeight(
        steps.to(torch.int16).add_(_OFFSET).to(torch.uint8), _panels(scale), None, len(weight)
    )


def pack_int4(weight: Tensor) -> PackedWeight:
    """`weight` [N, K] as 4 bits with a scale and a minimum per row and group of 32.

    Raises ValueError where a weight is not finite.
    """
    parts = [quantize_int4(part) for part in torch.split(weight, _ROWS_AT_ONCE)]
    whole, scale, minimum = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    steps = _steps(whole)
    halves = steps[:, :, : GROUP // _STEP // 2] | steps[:, :, GROUP // _STEP // 2 :] << 4
    return PackedWeight(halves.contiguous(), _panels(scale), _panels(minimum), len(weight))


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, K] quantised: (uint8 [N, G, 32] up to 15, scale and minimum bfloat16 [N, G]).

    A group tries several step widths, each with the scale and minimum that fit its whole numbers
    best, and takes the one with the least square error. Counting larger weights for more, as
    llama.cpp does, was worse here: KL 0.27 for 0.22.
    """
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight that is infinite or no number can't be kept as int4")
    values = _groups(weight)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    span = (high - low).clamp_min(_LEAST)
    best_scale, best_minimum = span / 15, low
    best = torch.full_like(low, torch.inf)
    for widened in _WIDTHS:
        whole = ((values - low) * ((15 + widened) / span)).round_().clamp_(0, 15)
        scale, minimum = _fitted(whole, values)
        error = (values - whole * scale - minimum).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    scale, minimum = best_scale.bfloat16(), best_minimum.bfloat16()
    steps = (values - minimum.float()) / scale.float().masked_fill(scale == 0, 1.0)
    whole = steps.round_().clamp_(0, 15).to(torch.uint8)
    return whole, scale.squeeze(-1), minimum.squeeze(-1)


def _fitted(whole: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum [N, G, 1] with which `whole` is nearest to `values`."""
    middle, mean = whole.mean(-1, keepdim=True), values.mean(-1, keepdim=True)
    apart = whole - middle
    spread = apart.square().sum(-1, keepdim=True)
    scale = (apart * values).sum(-1, keepdim=True) / spread.clamp_min(_LEAST)
    return scale, mean - scale * middle


def _groups(values: Tensor) -> Tensor:
    """[..., K] -> float32 [..., G, 32], zeros behind the last."""
    padded = F.pad(values.float(), (0, -values.shape[-1] % GROUP))
    return padded.view(*values.shape[:-1], padded.shape[-1] // GROUP, GROUP)


def _panels(values: Tensor) -> Tensor:
    """[N, G] -> [panels, G, 16]; columns beyond N are zeros."""
    padded = F.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _steps(values: Tensor) -> Tensor:
    """[N, G, 32] -> [panels, G, 8, 16, 4]."""
    padded = F.pad(values, (0, 0, 0, 0, 0, -len(values) % PANEL))
    split = padded.view(-1, PANEL, values.shape[1], GROUP // _STEP, _STEP)
    return split.permute(0, 2, 3, 1, 4).contiguous()


def unpacked(packed: PackedWeight, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that `packed` stands for, rounded once, to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, scale, minimum = packed.weight, packed.scale.to(wide), packed.minimum
    steps = weight if minimum is None else torch.cat([weight & 15, weight >> 4], 2)
    whole = steps.to(wide) - (_OFFSET if minimum is None else 0)
    values = whole * scale[:, :, None, :, None]
    if minimum is not None:
        values += minimum.to(wide)[:, :, None, :, None]
    rows = values.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    return rows[: packed.columns, :in_features].to(dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [..., K] quantised: (int8 [..., G, 32], scale float32 [..., G])."""
    groups = _groups(x)
    largest = groups.abs().amax(-1)
    zero, sound = largest < _LEAST, largest.isfinite()
    limit = torch.full_like(largest, _LARGEST)  # a number would be divided by its reciprocal
    steps = torch.where(zero | ~sound, 0.0, limit / largest)
    scale = torch.where(zero, 0.0, largest / limit).masked_fill(~sound, torch.nan)
    whole = (groups * steps.unsqueeze(-1)).round().nan_to_num(0.0)
    return whole.to(torch.int8), scale


def reference_linear_quantized(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """The operation in float64: [..., N]."""
    whole, scale = quantize_activations(x)
    rows = (whole.double() * scale.double().unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    y = rows @ unpacked(packed, x.shape[-1], torch.float64).T
    return y if bias is None else y + bias.double()


def plain_linear_quantized(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    """The operation in plain torch, for any device: makes all weights in float32 anew."""
    whole, steps = quantize_activations(x)
    rows = (whole * steps.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    packed = PackedWeight(weight, scale, minimum, columns)
    wide = F.linear(
        rows,
        unpacked(packed, x.shape[-1], torch.float32),
        None if bias is None else bias.float(),
    )
    return wide.to(x.dtype)


def plain_packed(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`plain_linear_quantized` over a packed weight."""
    parts = (packed.weight, packed.scale, packed.minimum)
    return plain_linear_quantized(x, *parts, bias, packed.columns)


def _fake(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    minimum: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    columns: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_linear_quantized = dispatch.declare(
    "linear_quantized",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? minimum, Tensor? bias, int columns) -> Tensor",
    plain_linear_quantized,
    _fake,
)


def linear_quantized(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over packed weights, on x's device: [..., N]. Contract above."""
    native.ensure()
    y: Tensor = _linear_quantized(
        x, packed.weight, packed.scale, packed.minimum, bias, packed.columns
    )
    return y
