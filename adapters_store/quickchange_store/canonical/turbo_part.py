"""Turbo heads: Medusa-style heads of an adapter that draft the tokens after the next one.

Head i (from 0) drafts token t + 2 + i where x, the hidden state that enters the LM head, belongs to
token t. A head is a few residual blocks, one after another:

    block   h = x + SiLU(W z + b)

and its logits are an LM head's of h: the base model's own (with whatever LoRA the request has
there), or one of the heads' own. Two kinds:

    parallel     every head starts from x, and z = x (Medusa; Cai and others, 2024)
    sequential   head i starts from what head i - 1 ended with (head 0 from x), and the first of its
                 blocks reads the token before the one it drafts too: z = [x; e], e that token's
                 input embedding (Hydra; Ankner and others, 2024. Recurrent drafter; Zhang and
                 others, 2024)

Heads may share blocks: a sequential head used at every depth is one block in the file. Where there
is a vocabulary, only its tokens are drafted, and only their rows of the LM head are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DraftBlock:
    """One residual block: weight [H, K], K = H, or 2 H where it reads an embedding; bias [H]."""

    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def reads_embedding(self) -> bool:
        return bool(self.weight.shape[1] == 2 * self.weight.shape[0])


@dataclass(frozen=True)
class TurboHeads:
    """All heads of an adapter. Raises InvalidAdapterError where the parts do not fit together."""

    blocks: tuple[DraftBlock, ...]
    heads: tuple[tuple[int, ...], ...]  # the blocks of each head, in order
    sequential: bool = False
    vocabulary: torch.Tensor | None = None  # int32 [D] ascending; None: every token
    outputs: tuple[torch.Tensor, ...] = ()  # own LM heads [D or V, H], one a head; or none
    # Whose requests they learned from: what they draft could tell others of these, by the time that
    # answers take, so that they draft for this tenant alone. None: for everybody.
    tenant: str | None = None

    def __post_init__(self) -> None:
        hidden = {int(block.weight.shape[0]) for block in self.blocks}
        if not self.heads or not all(self.heads) or len(hidden) != 1:
            raise InvalidAdapterError(
                f"{len(self.heads)} heads of blocks with hidden sizes {sorted(hidden)}",
                remedy="there must be a head, and each must have a block, all of one hidden size",
            )
        for block in self.blocks:
            width = tuple(block.weight.shape)
            if tuple(block.bias.shape) != width[:1] or width[1] not in (width[0], 2 * width[0]):
                raise InvalidAdapterError(
                    f"a block with weight {list(width)} and bias {list(block.bias.shape)}",
                    remedy="they must be [H, H] or [H, 2 H], and [H]",
                )
        for head in self.heads:
            self._check_head(head)
        if self.outputs and len(self.outputs) != len(self.heads):
            raise InvalidAdapterError(
                f"{len(self.outputs)} own LM heads for {len(self.heads)} heads",
                remedy="give one for each head, or none",
            )
        self._check_vocabulary()
        self._check_outputs()

    def _check_vocabulary(self) -> None:
        import numpy as np
        import torch

        tokens = self.vocabulary
        if tokens is None:
            return
        ascending = (
            tokens.dtype == torch.int32
            and tokens.ndim == 1
            and len(tokens) > 0
            and int(tokens[0]) >= 0
            and bool((np.diff(tokens.numpy()) > 0).all())  # torch would wake other threads
        )
        if not ascending:
            raise InvalidAdapterError(
                f"a vocabulary {tokens.dtype} {list(tokens.shape)} that is not a list of tokens",
                key="vocabulary",
                remedy="it must be int32 [D], ascending, from 0 and without repetition",
            )

    def _check_outputs(self) -> None:
        rows = None if self.vocabulary is None else len(self.vocabulary)
        shapes = {tuple(output.shape) for output in self.outputs}
        fitting = [
            s for s in shapes if len(s) == 2 and s[1] == self.hidden and rows in (None, s[0])
        ]
        if len(shapes) > 1 or len(fitting) != len(shapes):
            raise InvalidAdapterError(
                f"own LM heads {[list(shape) for shape in sorted(shapes)]} for a hidden size of "
                f"{self.hidden}" + ("" if rows is None else f" and a vocabulary of {rows} tokens"),
                key="outputs",
                remedy="they must be [V, H], or [D, H] where there is a vocabulary",
            )

    def _check_head(self, head: tuple[int, ...]) -> None:
        if not all(0 <= index < len(self.blocks) for index in head):
            raise InvalidAdapterError(
                f"a head of blocks {list(head)}",
                remedy=f"there are {len(self.blocks)} blocks, numbered from 0",
            )
        reads = [self.blocks[index].reads_embedding for index in head]
        if reads != [self.sequential] + [False] * (len(head) - 1):
            raise InvalidAdapterError(
                "a block reads an embedding where none is given, or does not where it should",
                remedy="weights are [H, 2 H] in the first block of sequential heads, else [H, H]",
            )

    @property
    def depth(self) -> int:
        """Tokens that the heads draft at once."""
        return len(self.heads)

    @property
    def hidden(self) -> int:
        return int(self.blocks[0].weight.shape[0])
