"""Spare rows behind a base's vocabulary, for tokens that adapters add.

The embedding and the LM head get rows of zero; an adapter's ordinary updates put its tokens' rows
there. Logits of spare tokens are -inf in every row whose adapters have no such token, so that
nothing else changes: a request without them has the tokens and the chances that it would have had.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quickchange_kernels.lowrank.lowrank_contract import Segments
from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.quantized_linear import FLOATS, is_plain
from quickchange_store.base_model.weight_reading import release

SETTING = "extra_vocabulary"
_NEVER = float("-inf")


def add_spare_tokens(model: nn.Module, count: int) -> None:
    """Put `count` rows of zero behind the embedding's and the LM head's; tied ones stay tied.

    One matrix at a time, by way of the host where it lies on a GPU: the device never holds two.
    Raises UnsupportedModelError where the model has no plain ends.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or not _is_plain(embedding.weight):
        raise _refused(model, "its input embedding is no matrix of floats")
    rows = embedding.num_embeddings
    if not isinstance(head, nn.Linear) or not is_plain(head) or head.out_features != rows:
        raise _refused(model, "its LM head is no linear of as many tokens as the embedding has")
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding
        if module.num_embeddings == rows or "embed_tokens" in path
    ]
    if others:
        raise _refused(model, f"{others[0]} reads token ids too")
    tied = head.weight is embedding.weight
    embedding.weight = _extended(embedding.weight, count)
    embedding.num_embeddings = rows + count
    head.weight = embedding.weight if tied else _extended(head.weight, count)
    head.out_features = rows + count
    if head.bias is not None:
        head.bias = _extended(head.bias, count)


def fence_(logits: Tensor, own: int, segments: Segments | None, tokens: Tensor | None) -> None:
    """Set the logits [R, V] of tokens that a row doesn't have to -inf, from column `own` on.

    segments: over these rows; None: no row has an adapter. tokens int32 [slots]: columns that are
    tokens under each slot, where they are more than `own`. No value comes to the host.
    """
    spare = logits[:, own:]
    if not spare.shape[1]:
        return
    if segments is None or tokens is None or not segments.slot.shape[0]:
        spare.fill_(_NEVER)
        return
    row = torch.arange(logits.shape[0], device=logits.device)
    covers = (segments.rows[:, :1] <= row) & (row < segments.rows[:, 1:])  # [S, R]
    of_segment = tokens.index_select(0, segments.slot)[:, None]
    reach = torch.where(covers, of_segment, 0).amax(0)  # [R]
    column = torch.arange(own, logits.shape[1], device=logits.device)
    spare.masked_fill_(column >= reach[:, None], _NEVER)


def _extended(weight: Tensor, count: int) -> nn.Parameter:
    """The parameter with `count` zeros, or rows of zeros, behind it; its memory is given back."""
    rows, shape = weight.shape[0], (weight.shape[0] + count, *weight.shape[1:])
    device, dtype, kept = weight.device, weight.dtype, weight.detach()
    if kept.device.type not in ("cpu", "meta"):
        kept = kept.cpu()
        weight.data = weight.new_empty(0)
    made = torch.empty(shape, dtype=dtype, device=device)
    made[:rows] = kept
    made[rows:] = 0
    release(kept)
    return nn.Parameter(made, requires_grad=False)


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS


def _refused(model: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{SETTING}: {type(model).__name__} can't have spare tokens: {why}; serve it with 0",
        param=SETTING,
    )
