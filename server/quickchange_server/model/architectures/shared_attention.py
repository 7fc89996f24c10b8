"""Attention modules that several layers share: each call says which layer it is for.

Zamba's models have one attention block, with one set of weights, in many layers, whose keys and
values are apart. Its modules take the layer's index as an argument, where those of other models
hold it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_ARGUMENT = "layer_idx"


def follow_calls(model: nn.Module) -> None:
    """Make shared modules hold the index of the layer that they are being called for."""
    for module in model.modules():
        named = _ARGUMENT in inspect.signature(module.forward).parameters
        if hasattr(module, _ARGUMENT) and named:
            module.register_forward_pre_hook(_take_index, with_kwargs=True)


def _take_index(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get(_ARGUMENT) is not None:
        module.layer_idx = kwargs[_ARGUMENT]
