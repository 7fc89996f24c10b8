"""Uniform numbers that tell whether a version's masses have every bit of the plain version's."""

from __future__ import annotations

import torch
from torch import Tensor

from quickchange_kernels.sampling.sample_contract import Draws
from quickchange_kernels.sampling.sample_plain import masses


def draws_at_edges(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Draws, list[int]]:
    """Logits [2 R, V], how to draw from them, and the tokens that must come out.

    Each row twice: its uniform number falls half a unit of mass below, and above, the running sum
    at a token in the middle, so that a sum of masses that is off by one gives another token.
    """
    running = masses(logits, logits.amax(dim=1, keepdim=True), temperature).cumsum(dim=1)
    middle = running[:, [logits.shape[1] // 2]]
    edge, total = middle.squeeze(1).double(), running[:, -1].double()
    # half a unit must not be lost in rounding, and both numbers must lie in the unit interval
    assert total.max() < 2**51
    assert ((edge > 0) & (edge < total)).all()
    below, above = (torch.searchsorted(running, middle, right=right) for right in (False, True))
    how = Draws(temperature.repeat(2), torch.cat([(edge - 0.5) / total, (edge + 0.5) / total]))
    return logits.repeat(2, 1), how, torch.cat([below, above]).squeeze(1).tolist()
