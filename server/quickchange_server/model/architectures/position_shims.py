"""Models that count positions in their own way, made to take those of the step's rows.

Decoders of BART's kind ignore `position_ids` and count from the start of what they are given.
Those of RoBERTa's kind begin to count behind the padding token's index. (transformers also leaves
padding tokens out of the count; a text that is served has none.)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig

# Names for the most positions, in configurations that don't map theirs to the first.
_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions")
_NO_LIMIT = 1 << 20  # tokens, where neither a table nor a configuration has an end (ALiBi)


def take_positions(model: nn.Module) -> None:
    """Make modules that count positions themselves take `position_ids` as the model gets them."""
    step = _StepPositions()
    counting = [module for module in model.modules() if _counts_rows(module)]
    for module in counting:
        module.forward = step.embedding(module)
    if counting:
        model.register_forward_pre_hook(step.note, with_kwargs=True)
    for module in model.modules():
        if (first := _first_position(module)) is not None:
            module.register_forward_pre_hook(_shift(first), with_kwargs=True)


def most_positions(model: nn.Module, config: PretrainedConfig) -> int:
    """Tokens for which the model has positions."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in _LIMITS)
    limit = next((int(limit) for limit in limits if limit is not None), _NO_LIMIT)
    if getattr(text, "keep_window_size", None):  # Doge attends to all keys up to there
        limit = min(limit, int(text.keep_window_size))
    if getattr(text, "attention_type", None) == "block_sparse":  # BigBird, likewise
        limit = min(limit, (5 + 2 * text.num_random_blocks) * text.block_size)
    return limit - max((_first_position(module) or 0 for module in model.modules()), default=0)


class _StepPositions:
    """Positions of the rows of the pass that runs."""

    def __init__(self) -> None:
        self._positions: torch.Tensor | None = None  # [T]

    def note(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positions = kwargs["position_ids"][0]

    def embedding(self, table: Any) -> Any:
        """Forward function of an embedding of positions, whatever it is given: [T, H]."""
        offset = getattr(table, "offset", 0)

        def forward(*_: Any, **__: Any) -> torch.Tensor:
            assert self._positions is not None
            return functional.embedding(self._positions + offset, table.weight)

        return forward


def _counts_rows(module: nn.Module) -> bool:
    """Whether a module embeds positions that it counts from a cache's length."""
    return (
        isinstance(module, nn.Embedding)
        and "past_key_values_length" in inspect.signature(module.forward).parameters
    )


def _first_position(module: nn.Module) -> int | None:
    """Position of a text's first token where embeddings are laid out as RoBERTa's are."""
    if not hasattr(module, "create_position_ids_from_input_ids"):
        return None
    padding: int | None = getattr(module, "padding_idx", None)
    return None if padding is None else padding + 1


def _shift(first: int) -> Any:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + first}

    return hook
