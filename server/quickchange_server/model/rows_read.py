"""Which rows of a step each linear reads: found by a short pass, since models differ.

transformers cuts the hidden states to the rows that are asked for (`logits_to_keep`) in front of
the LM head, and some models have more than the head behind that cut: ModernBERT's decoder and
BERT's descendants send them through a linear of their own first. Experts read what a router gives
them, in an order of its own. Segments of adapters lie over rows of the step, so a module's adapter
updates need the rows that the module reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.quantized_linear import linear_shape
from quickchange_store.base_model.expert_parts import routed

Rows = Literal["tokens", "samples", "head"]  # all; those asked for; those that the LM head reads

# Rows of the short pass, of which no model has as many heads, and those that are asked for.
TOKENS = 11
_ASKED = (3, 1)
ASKED = len(_ASKED)


def rows_read(
    model: nn.Module, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[dict[str, Rows | None], frozenset[str]]:
    """The rows that each linear reads, by path, and the paths of those that are called at all.

    None: other rows than these. A model may read the weight of a linear that it does not call.
    run: the logits of asked rows in a pass of the unwrapped model: (ids [T], rows [R]) to [R, V].
    Raises UnsupportedModelError for a model that makes other logits than those asked for.
    """
    with _noting_rows(model) as counts:
        logits = run(torch.arange(TOKENS) % 3, torch.tensor(_ASKED))
    if logits.shape[0] != ASKED:
        raise UnsupportedModelError(
            f"{type(model).__name__} makes logits of {logits.shape[0]} rows where {ASKED} "
            "are asked for (logits_to_keep); such models can't be served"
        )
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    rows: dict[str, Rows | None] = {
        path: "head" if module is head else _rows_of(path, module, counts)
        for path, module in model.named_modules()
        if linear_shape(module) is not None
    }
    return rows, frozenset(counts)


def _rows_of(path: str, module: nn.Module, counts: Mapping[str, set[int]]) -> Rows | None:
    if routed(path, module):
        return None
    seen = counts.get(path, {TOKENS})  # a module that no text reaches stands as any other
    known: dict[int, Rows] = {TOKENS: "tokens", ASKED: "samples"}
    return known.get(next(iter(seen))) if len(seen) == 1 else None


@contextmanager
def _noting_rows(model: nn.Module) -> Iterator[dict[str, set[int]]]:
    """Row counts of the inputs that each linear reads during the block, by path."""
    counts: dict[str, set[int]] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next(iter((*args, *named.values())))
            counts.setdefault(path, set()).add(x.shape[:-1].numel())

        return hook

    hooks = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in model.named_modules()
        if linear_shape(module) is not None
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
