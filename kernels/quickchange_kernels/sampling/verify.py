"""verify: how many of each sequence's drafts hold, and the token after them.

Every row of a sequence fed one token: the first its last known token, the others drafts. A row's
draft holds where it is the token sampled at the row's parent, and its parent's draft holds. The
result is the longest path of drafts that hold from the first row down: of equal ones, the one whose
last row comes first. Sampled tokens depend on (seed, position) alone, so what is accepted is what
would have been drawn without drafts.

Contract
    sampled   int64 [T]     the token drawn from each row's logits
    drafted   int64 [T]     the token that each row fed; a sequence's first is not read
    rows      int32 [B, 2]  each sequence's rows [begin, end), at most `longest`, which is 1 to 128;
                            begin == end: no sequence there (padding)
    parent    int32 [T]     the row that each row goes on from, in its sequence and before it; a
                            sequence's first is not read. None: the row before, a chain
    returns   accepted int32 [B]           drafts that hold, one fewer than the path's rows
              token    int64 [B]           sampled at the path's last row
              path     int32 [B, longest]  the path's rows from the first on, then -1
For padding, accepted and token are 0 and the path is empty. Rows in no sequence are not read.
Knows nothing of how drafts are made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels import dispatch, native

MAX_ROWS = 128


class Verified(NamedTuple):
    """What `verify` returns."""

    accepted: Tensor  # int32 [B]
    token: Tensor  # int64 [B]
    path: Tensor  # int32 [B, longest]


def reference_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int, parent: Tensor | None = None
) -> list[tuple[int, int, list[int]]]:
    """(accepted, token, path's rows) of each sequence, row by row on the host."""
    token, draft = sampled.tolist(), drafted.tolist()
    above = [t - 1 for t in range(len(token))] if parent is None else parent.tolist()
    results = []
    for begin, end in rows.tolist():
        paths: dict[int, list[int]] = {begin: [begin]} if begin < end else {}
        for row in range(begin + 1, min(end, begin + longest)):
            if above[row] in paths and draft[row] == token[above[row]]:
                paths[row] = [*paths[above[row]], row]
        path = max(paths.values(), key=len, default=[])
        results.append((max(0, len(path) - 1), token[path[-1]] if path else 0, path))
    return results


def plain_verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, parent: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation in plain torch, for any device."""
    begin, end = rows.long().unbind(1)
    node = torch.arange(longest, device=rows.device)
    row = begin[:, None] + node  # [B, longest]
    live = row < end[:, None]
    row = torch.where(live, row, 0)
    above = row - 1 if parent is None else parent[row].long()
    inner = node > 0
    above = torch.where(live & inner, above - begin[:, None], 0).clamp(0, longest - 1)
    token = sampled[row] if len(sampled) else row
    draft = drafted[row] if len(sampled) else row
    matches = live & inner & (draft == token.gather(1, above))
    depth = torch.where(live & ~inner, 0, -1)  # of the path down to a node; -1: it does not hold
    for _ in range(longest - 1):
        down = depth.gather(1, above)
        depth = torch.where(matches & (down >= 0), down + 1, depth)
    accepted, last = depth.clamp(min=0).max(dim=1).values, depth.argmax(dim=1)
    path = torch.full_like(row, -1)
    node_of_path = last[:, None]
    for _ in range(longest):
        place = depth.gather(1, node_of_path).clamp(min=0)
        path.scatter_(1, place, node_of_path)
        node_of_path = above.gather(1, node_of_path)
    sound = live[:, :1]
    path = torch.where(sound & (path >= 0), path + begin[:, None], -1)
    after = torch.where(sound, token.gather(1, last[:, None]), 0).squeeze(1)
    return accepted.int(), after, path.int()


def _fake(
    sampled: Tensor,
    drafted: Tensor,  # noqa: ARG001
    rows: Tensor,
    parent: Tensor | None,  # noqa: ARG001
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
    "(Tensor sampled, Tensor drafted, Tensor rows, Tensor? parent, int longest) "
    "-> (Tensor, Tensor, Tensor)",
    plain_verify,
    _fake,
)
dispatch.triton_version("verify", "quickchange_kernels.sampling.verify_triton:launch_verify")


def verify(
    sampled: Tensor, drafted: Tensor, rows: Tensor, longest: int, parent: Tensor | None = None
) -> Verified:
    """The operation on the tokens' device. Contract above; raises ValueError where it is broken."""
    if not 1 <= longest <= MAX_ROWS:
        raise ValueError(f"verify: longest is {longest}; it must be 1 to {MAX_ROWS} rows")
    if sampled.shape != drafted.shape or (parent is not None and parent.shape != sampled.shape):
        raise ValueError(
            f"verify: sampled {tuple(sampled.shape)}, drafted {tuple(drafted.shape)} and parent "
            f"{None if parent is None else tuple(parent.shape)} must have one shape"
        )
    native.ensure()
    return Verified(*_verify(sampled, drafted, rows, parent, longest))
