"""What lets a transformers model run on a flattened batch and for the asked rows alone.

Conv1D             GPT-2's linears become `nn.Linear`, so that all else knows one kind
positions          decoders of BART's kind count them from the start of what they are given, those
                   of RoBERTa's from behind the padding token's index: they take the step's
                   (transformers also leaves padding tokens out of the count; a text that is
                   served has none)
shared attention   Zamba has one attention block in many layers, whose keys and values are apart:
                   it holds the index of the layer that it is being called for
asked rows         where a forward pass has no `logits_to_keep`, the LM head reads them alone
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quickchange_server.errors import UnsupportedModelError

# Names for the most positions, in configurations that don't map theirs to the first.
_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions")
_NO_LIMIT = 1 << 20  # tokens, where neither a table nor a configuration has an end (ALiBi)
_LAYER = "layer_idx"  # argument of modules that several layers share


def fit_to_batch(model: nn.Module) -> HeadRows:
    """Change modules in place; the LM head must be attached to what is returned when it changes."""
    linears_of_conv1d(model)
    take_positions(model)
    follow_calls(model)
    head_rows = HeadRows(model)
    head_rows.attach(model.get_output_embeddings())  # type: ignore[operator]
    return head_rows


def linears_of_conv1d(model: nn.Module) -> None:
    """Replace each Conv1D in place by an `nn.Linear` on the transposed weight.

    One weight after the other, so that no more than one is in memory twice.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is Conv1D:
                setattr(parent, name, _linear(module))


def _linear(module: Conv1D) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(module.nx, module.nf)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear


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
    """True if a module embeds positions that it counts from a cache's length."""
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


def follow_calls(model: nn.Module) -> None:
    """Make shared modules hold the index of the layer that they are being called for."""
    for module in model.modules():
        named = _LAYER in inspect.signature(module.forward).parameters
        if hasattr(module, _LAYER) and named:
            module.register_forward_pre_hook(_take_index, with_kwargs=True)


def _take_index(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get(_LAYER) is not None:
        module.layer_idx = kwargs[_LAYER]


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
