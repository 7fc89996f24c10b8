"""Verification of drafts on the device: the accepted ones, and the last token of each sequence.

Every row of a sampling sequence was fed one token: its last known one, then drafts. A sampled token
depends on (seed, position) alone, so the tokens of the rows down to the first rejected draft are
those that would have been sampled one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels.sampling.verify import verify
from quickchange_server.spec_decode.step_view import PlannedItem


class Verdict(NamedTuple):
    """Accepted drafts and last tokens of S sampling items over R rows."""

    accepted: Tensor | None  # int32 [S] accepted drafts; None: nothing was drafted
    last_row: Tensor | None  # int64 [S] the row that gave the last token; None: row i of item i
    token: Tensor  # int64 [S] that token

    def counts(self, items: int) -> list[int]:
        """Number of accepted drafts of each item, on the host."""
        return [0] * items if self.accepted is None else self.accepted.tolist()

    def at_last_rows(self, values: Tensor) -> Tensor:
        """Values [S, ...] of `values` [R, ...] at the rows that gave the last tokens."""
        return values if self.last_row is None else values[self.last_row]


def judge(sampling: Sequence[PlannedItem], tokens: Tensor) -> Verdict:
    """Judge the drafts of the items. tokens int64 [R]: sampled from their rows, in order."""
    if len(tokens) == len(sampling):
        return Verdict(None, None, tokens)
    fed: list[int] = []
    for item in sampling:
        fed += (0, *item.drafts)  # the first is certain: it is not compared
    ends = list(accumulate([item.sampled_rows for item in sampling]))
    rows = list(zip([0, *ends], ends, strict=False))
    device = tokens.device
    verified = verify(
        tokens,
        torch.tensor(fed, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device),
        longest=max(item.sampled_rows for item in sampling),
    )
    last = verified.path.gather(1, verified.accepted.long()[:, None]).squeeze(1)
    return Verdict(verified.accepted, last.long(), verified.token)
