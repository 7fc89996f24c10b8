"""The hidden states that enter the LM head, from which drafting heads start.

Models scale or norm them in their own ways before the head, and scale or cap the logits behind it:
only the head's own input is the same thing everywhere. It is a tensor of the forward pass, so in a
captured graph it is an output like the logits; nothing here runs when the graph is replayed.
"""

from __future__ import annotations

import torch
from torch import nn


class HeadInput:
    """Keeps the input of an LM head until it is taken."""

    def __init__(self, head: nn.Module) -> None:
        """Watches `head` from now on."""
        self._seen: torch.Tensor | None = None  # [..., H]
        self.rows: int | None = None  # of the coming pass: the head sees so many; None: all
        head.register_forward_pre_hook(self._keep)

    def take(self) -> torch.Tensor:
        """[R, H] of the pass that has just run.

        Raises RuntimeError if none has since the last call.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError("the model made logits without calling its LM head")
        return seen.reshape(-1, seen.shape[-1])

    def _keep(
        self, _head: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        self._seen = args[0]
        return None if self.rows is None else (args[0][..., : self.rows, :], *args[1:])
