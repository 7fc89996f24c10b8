"""Models whose forward pass has no `logits_to_keep`: their LM heads read the asked rows alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quickchange_server.errors import UnsupportedModelError


class HeadRows:
    """Makes `logits_to_keep` cut the input [1, T, H] of a model's head, if the model does not.

    Arguments that the model's forward function has no name for are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        """Call `attach` before the model runs."""
        parameters = inspect.signature(model.forward).parameters.values()
        self._names = {parameter.name for parameter in parameters}
        self._any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._asked: int | torch.Tensor = 0  # as transformers has it: so many last rows, or which
        self._handle: RemovableHandle | None = None
        self._cuts = "logits_to_keep" not in self._names
        if self._cuts:
            model.register_forward_pre_hook(self._note, with_kwargs=True)

    def attach(self, head: nn.Module) -> None:
        """Cut what `head` reads from now on, and no other module."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = head.register_forward_pre_hook(self._cut) if self._cuts else None

    def _note(
        self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._asked = kwargs.pop("logits_to_keep")
        known = {name: x for name, x in kwargs.items() if self._any_name or name in self._names}
        return args, known

    def _cut(self, _head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        asked = self._asked
        if args[0].dim() != 3:
            raise UnsupportedModelError(
                f"its LM head reads {tuple(args[0].shape)}, not a row a token; models that predict "
                "several tokens at once are not supported"
            )
        return (args[0][:, slice(-asked, None) if isinstance(asked, int) else asked], *args[1:])
