"""draft_logits: an LM head over some of its tokens, a list of them for each segment of rows.

    out[i, j] = weight[vocabulary[begin + j]] · h[i] (+ bias of that token),   j < its list's size
    out[i, j] = -inf                                                           from there on

For draft heads whose adapter lists the tokens that its task uses: the rest of the LM head is not
read, and the tokens' rows stay where they are.

Contract
    h           [I, H]  float32, bfloat16 or float16; rows contiguous (any row stride)
    weight      [V, H]  likewise; may have another dtype than h
    vocabulary  int32 [S]     lists of tokens, one after another
    segments    int32 [R, 4]  (begin, end, first, last): rows [begin, end) of h are over the tokens
                vocabulary[first:last], at most `width`; every row stands in exactly one segment;
                begin == end: padding
    width       columns of the result, at least 1
    bias        [V]  of weight's dtype, or None
    returns     [I, width] float32, new, contiguous
A segment's tokens are read once for all of its rows. The sum of an element runs in an order that H
alone decides. Tokens and segments out of range raise IndexError on a CPU; on a GPU they must not
occur. Knows nothing of adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quickchange_kernels import dispatch, native
from quickchange_kernels.index_checks import check_indices, check_ranges, live_ranges


def reference_draft_logits(
    h: Tensor,
    weight: Tensor,
    vocabulary: Tensor,
    segments: Tensor,
    width: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The operation in float64."""
    out = torch.full((h.shape[0], width), float("-inf"), dtype=torch.float64)
    for begin, end, first, last in segments.tolist():
        for i in range(begin, end):
            for j, token in enumerate(vocabulary[first:last].tolist()):
                out[i, j] = weight[token].double() @ h[i].double()
                if bias is not None:
                    out[i, j] += bias[token].double()
    return out


def plain_draft_logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: Tensor,
    segments: Tensor,
    width: int,
) -> Tensor:
    """The operation in plain torch, for any device."""
    out = h.new_full((h.shape[0], width), float("-inf"), dtype=torch.float32)
    live = live_ranges(segments)
    check_ranges("draft_logits: segments' rows", live[:, :2], h.shape[0])
    check_ranges("draft_logits: segments' tokens", live[:, 2:], vocabulary.shape[0])
    check_indices("draft_logits: segments' sizes", live[:, 3] - live[:, 2], width + 1)
    for begin, end, first, last in segments.tolist():
        if begin < end:
            tokens = vocabulary[first:last]
            check_indices("draft_logits: vocabulary", tokens, weight.shape[0])
            added = None if bias is None else bias[tokens].float()
            product = F.linear(h[begin:end].float(), weight[tokens].float(), added)
            out[begin:end, : last - first] = product
    return out


def _fake(
    h: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    vocabulary: Tensor,  # noqa: ARG001
    segments: Tensor,  # noqa: ARG001
    width: int,
) -> Tensor:
    return h.new_empty((h.shape[0], width), dtype=torch.float32)


_draft_logits = dispatch.declare(
    "draft_logits",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor vocabulary, Tensor segments, int width) "
    "-> Tensor",
    plain_draft_logits,
    _fake,
)
dispatch.triton_version(
    "draft_logits", "quickchange_kernels.turbo_heads.draft_logits_triton:launch_draft_logits"
)


def draft_logits(
    h: Tensor,
    weight: Tensor,
    vocabulary: Tensor,
    segments: Tensor,
    width: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Logits of h over each segment's tokens, on h's device: float32 [I, width]. Contract above.

    Raises ValueError where h and weight are not [I, H] and [V, H] with contiguous rows.
    """
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(
            f"draft_logits: h {list(h.shape)} and weight {list(weight.shape)} must be [I, H] and "
            "[V, H]"
        )
    if h.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"draft_logits: h has strides {h.stride()} and weight {weight.stride()}; their rows "
            "must be contiguous"
        )
    native.ensure()
    out: Tensor = _draft_logits(h, weight, bias, vocabulary, segments, width)
    return out
