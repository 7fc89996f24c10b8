"""verify: accept each sequence's drafts as long as they hold, and give the token after them.

Every row of a sequence fed one token: the first its last known token, the others drafts. A draft
holds where it is the token sampled at the row before, and the drafts before it hold. Sampled tokens
depend on (seed, position) alone, so what is accepted is what would have been drawn without drafts.

Contract
    sampled   int64 [T]     the token drawn from each row's logits
    drafted   int64 [T]     the token that each row fed; a sequence's first is not read
    rows      int32 [B, 2]  each sequence's rows [begin, end), at most `longest`, which is 1 to 128;
                            begin == end: no sequence there (padding)
    returns   accepted int32 [B]           drafts that hold, one fewer than the path's rows
              token    int64 [B]           sampled at the path's last row
              path     int32 [B, longest]  the first row and those of the drafts that hold, then -1
For padding, accepted and token are 0 and the path is empty. Rows in no sequence are not read.
Knows nothing of how drafts are made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native
from quickchange_kernels.index_checks import check_ranges, live_ranges

MAX_ROWS = 128


class Verified(NamedTuple):
    """Drafts accepted in each sequence, and the token after them."""

    accepted: Tensor  # int32 [B]
    token: Tensor  # int64 [B]
    path: Tensor  # int32 [B, longest]


def reference_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int
) -> list[tuple[int, int, list[int]]]:
    """(accepted, token, path's rows) of each sequence, row by row on the host."""
    token, draft = sampled.tolist(), drafted.tolist()
    results = []
    for begin, end in rows.tolist():
        path = [begin] if begin < end else []
        for row in range(begin + 1, min(end, begin + longest)):
            if draft[row] != token[row - 1]:
                break
            path.append(row)
        results.append((max(0, len(path) - 1), token[path[-1]] if path else 0, path))
    return results


def plain_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation in plain torch, for any device."""
    begin, end = rows.long().unbind(1)
    ends = torch.minimum(end, begin + longest)
    check_ranges("verify: rows", live_ranges(torch.stack([begin, ends], 1)), len(sampled))
    row = begin[:, None] + torch.arange(longest, device=rows.device)  # [B, longest]
    live = row < end[:, None]
    row = torch.where(live, row, 0)
    token, draft = (each[row] if len(each) else row for each in (sampled, drafted))
    matches = torch.cat([live[:, :1], live[:, 1:] & (draft[:, 1:] == token[:, :-1])], dim=1)
    held = matches.cumprod(1)
    accepted = (held.sum(1) - 1).clamp(min=0)
    after = torch.where(live[:, 0], token.gather(1, accepted[:, None]).squeeze(1), 0)
    path = torch.where(held > 0, row, -1)
    return accepted.int(), after, path.int()


def _fake(
    sampled: Tensor,
    drafted: Tensor,  # noqa: ARG001
    rows: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count = rows.shape[0]
    return (
        rows.new_empty(count),
        sampled.new_empty(count),
        rows.new_empty((count, longest)),
    )


_verify = dispatch.declare(
    "verify",
    "(Tensor sampled, Tensor drafted, Tensor rows, int longest) -> (Tensor, Tensor, Tensor)",
    plain_verify,
    _fake,
)
dispatch.triton_version("verify", "quickchange_kernels.sampling.verify_triton:launch_verify")


def verify(sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int) -> Verified:
    """Verify drafts on the tokens' device. Contract above; ValueError where it is broken."""
    if not 1 <= longest <= MAX_ROWS:
        raise ValueError(f"verify: longest is {longest}; it must be 1 to {MAX_ROWS} rows")
    if sampled.shape != drafted.shape:
        raise ValueError(
            f"verify: sampled {tuple(sampled.shape)} and drafted {tuple(drafted.shape)} must have "
            "one shape"
        )
    native.ensure()
    return Verified(*_verify(sampled, drafted, rows, longest))
