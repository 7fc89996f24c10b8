"""Verification of drafts on the device: the accepted ones, and the last token of each sequence.

Every row of a sampling sequence was fed one token: its last known one, then drafts. A sampled token
depends on (seed, position) alone, so the tokens of the rows down to the first rejected draft are
those that would have been sampled one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels.sampling.verify import MAX_ROWS, verify
from quickchange_server.spec_decode.step_view import PlannedItem


@dataclass(frozen=True, slots=True)
class Fed:
    """What the sampled rows of S items fed, by which their drafts are judged."""

    tokens: Tensor  # int64 [R]; an item's first is certain, and not compared
    rows: Tensor  # int32 [S, 2] (begin, end) of each item
    longest: int  # no item has more rows; a power of two, so that few kernels serve all steps


class Verdict(NamedTuple):
    """Accepted drafts and last tokens of S sampling items over R rows."""

    accepted: Tensor | None  # int32 [S] accepted drafts; None: nothing was drafted
    last_row: Tensor | None  # int64 [S] the row that gave the last token; None: row i of item i
    token: Tensor  # int64 [S] that token

    def at_last_rows(self, values: Tensor) -> Tensor:
        """Values [S, ...] of `values` [R, ...] at the rows that gave the last tokens."""
        return values if self.last_row is None else values.index_select(0, self.last_row)


def fed(sampling: Sequence[PlannedItem]) -> Fed | None:
    """What the items' sampled rows fed, on the host; None if none has a draft."""
    counts = [item.sampled_rows for item in sampling]
    most = max(counts, default=1)
    if most == 1:
        return None
    tokens: list[int] = []
    for item in sampling:
        tokens += (0, *item.drafts)
    ends = list(accumulate(counts))
    rows = list(zip([0, *ends], ends, strict=False))
    longest = min(1 << (most - 1).bit_length(), MAX_ROWS)
    return Fed(torch.tensor(tokens), torch.tensor(rows, dtype=torch.int32), longest)


def judge(tokens: Tensor, by: Fed | None) -> Verdict:
    """Judge the drafts by the tokens int64 [R] that were sampled from the rows, all on the device.

    by: None: nothing was drafted.
    """
    if by is None:
        return Verdict(None, None, tokens)
    verified = verify(tokens, by.tokens, by.rows, longest=by.longest)
    last = verified.path.gather(1, verified.accepted.long()[:, None]).squeeze(1)
    return Verdict(verified.accepted, last.long(), verified.token)
