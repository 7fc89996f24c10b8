"""Adapters whose model had another number of tokens than the base: `resize_token_embeddings`.

Such an adapter is read against the base as it was resized: rows that the base lacks are zero, so
that what the folder says of them is their update. Rows that the adapter's model lacks get a bias by
which their tokens are never chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    BaseWeights,
    LowRankUpdate,
    ModuleShape,
)
from quickchange_store.canonical.tokenizer_part import MOST_ROWS, MOST_TOKENS
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.vocabulary.tokenizer_files import folder_tokenizer

if TYPE_CHECKING:
    import torch

NEVER = -1e4  # added to a logit: float16 holds it


def resized_base(base: BaseSpec, tensors: AdapterTensors, prefix: str, named: int) -> BaseSpec:
    """The base with as many tokens as the adapter's model had, by the shapes of its tensors.

    prefix: of the tensors' names, before a module's path. named: tokens that its configuration
    names by number, from 0. Raises BaseMismatchError where its tensors disagree.
    """
    own = _tokens_of(base)
    if own is None:
        return base
    found = {
        tensors.shape(key)[axis]: key
        for path, shape in _ends(base).items()
        for key, axis in _sized(prefix + path, shape)
        if key in tensors and len(tensors.shape(key)) == 2
    }
    if len(found) > 1:
        one, other, *_ = sorted(found)
        raise BaseMismatchError(
            f"it has {other} tokens, and {tensors.name(found[one])} has {one}",
            file=tensors.file_of(found[other]),
            key=tensors.name(found[other]),
            remedy="save the adapter again, after model.resize_token_embeddings",
        )
    rows = max(max(found, default=own), named)
    plausible = own // 2 < rows <= min(own + MOST_TOKENS, MOST_ROWS)
    return _resized(base, rows) if rows != own and plausible else base


def with_tokenizer(imported: Imported, directory: Path, base: BaseSpec) -> Imported:
    """What was imported, with what the folder's tokenizer adds to the base's. Raises StoreError."""
    own, adapter = _tokens_of(base), imported.adapter
    if own is None:
        return imported
    ends = {path: shape for path, shape in _ends(base).items() if path in adapter.updates}
    counts = [_count(adapter.updates[path], shape) for path, shape in ends.items()]
    rows = max(counts, default=own)
    changes = folder_tokenizer(directory, base.tokenizer, rows, own)
    updates = dict(adapter.updates)
    if rows > own:
        _check_room(rows - own, base)
        _check_rows(updates, base, rows)
    elif rows < own:
        updates |= {path: _widened(updates[path], shape, own) for path, shape in ends.items()}
        updates |= _never(updates, base, rows)
        updates = {path: updates[path] for path in (*base.modules, *updates) if path in updates}
    return replace(imported, adapter=replace(adapter, updates=updates, tokenizer=changes))


def _ends(base: BaseSpec) -> dict[str, ModuleShape]:
    """The input embedding and the LM head, by path."""
    return {
        path: shape
        for path, shape in base.modules.items()
        if shape.kind == "embedding" or path == base.output_head
    }


def _tokens_of(base: BaseSpec) -> int | None:
    """Tokens of the base; None where its ends have different numbers of them, or there are none."""
    counts = {
        shape.in_features if shape.kind == "embedding" else shape.out_features
        for shape in _ends(base).values()
    }
    return counts.pop() if len(counts) == 1 else None


def _sized(path: str, shape: ModuleShape) -> list[tuple[str, int]]:
    """Tensors that have a row or a column for each token, and which of their axes it is."""
    kept = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    whole = [(f"{path}.{name}", 0) for name in kept]
    if shape.kind == "embedding":
        return [*whole, (f"{path}.lora_embedding_A", 1)]
    return [*whole, (f"{path}.lora_B.weight", 0)]


def _count(update: LowRankUpdate, shape: ModuleShape) -> int:
    return int(update.a.shape[1] if shape.kind == "embedding" else update.b.shape[0])


@dataclass(frozen=True)
class _ResizedWeights:
    """The base's weights, with other numbers of rows in some."""

    weights: BaseWeights
    resized: frozenset[str]
    rows: int

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter `name`, with rows of zero behind the base's, or without its last ones."""
        found = self.weights.tensor(name)
        if name not in self.resized:
            return found
        made = found.new_zeros((self.rows, *found.shape[1:]))
        made[: len(found)] = found[: self.rows]
        return made


def _resized(base: BaseSpec, rows: int) -> BaseSpec:
    ends = _ends(base)
    shapes = {
        path: replace(shape, in_features=rows)
        if shape.kind == "embedding"
        else replace(shape, out_features=rows)
        for path, shape in ends.items()
    }
    names = frozenset(f"{path}.{part}" for path in ends for part in ("weight", "bias"))
    weights = base.weights
    return replace(
        base,
        modules={**base.modules, **shapes},
        weights=None if weights is None else _ResizedWeights(weights, names, rows),
    )


def _check_room(more: int, base: BaseSpec) -> None:
    """Raise UnsupportedFeatureError where the server that imports it has no room for it."""
    if base.spare_tokens is not None and more > base.spare_tokens:
        raise UnsupportedFeatureError(
            f"the adapter's model has {more} more tokens than the base, and this server has room "
            f"for {base.spare_tokens}",
            key="extra_vocabulary",
            remedy=f"serve with --extra-vocabulary {more} or more",
        )


def _check_rows(updates: Mapping[str, LowRankUpdate], base: BaseSpec, rows: int) -> None:
    """Raise InvalidAdapterError where an end has no rows for the adapter's own tokens."""
    for path, shape in _ends(base).items():
        update = updates.get(path)
        if update is None or _count(update, shape) != rows:
            raise InvalidAdapterError(
                f"the adapter has {rows} tokens, and no rows of {path} for those that it adds",
                key=path,
                remedy="save it with save_pretrained(FOLDER, save_embedding_layers=True), or train "
                "them there too (trainable_token_indices, modules_to_save)",
            )


def _widened(update: LowRankUpdate, shape: ModuleShape, own: int) -> LowRankUpdate:
    """The update of an end with zeros for the base's tokens that the adapter's model lacks."""
    from torch.nn.functional import pad

    more = own - _count(update, shape)
    if shape.kind == "embedding":
        return replace(update, a=pad(update.a, (0, more)))
    bias, gain = update.bias, update.gain
    return replace(
        update,
        b=pad(update.b, (0, 0, 0, more)),
        bias=None if bias is None else pad(bias, (0, more)),
        gain=None if gain is None else pad(gain, (0, more), value=1.0),
    )


def _never(
    updates: Mapping[str, LowRankUpdate], base: BaseSpec, rows: int
) -> dict[str, LowRankUpdate]:
    """The LM head's update, by which tokens from `rows` on are never chosen."""
    import torch

    path = base.output_head
    if path is None:
        return {}
    shape = base.modules[path]
    nothing = LowRankUpdate(
        torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0), 1.0
    )
    update = updates.get(path, nothing)
    bias = torch.zeros(shape.out_features) if update.bias is None else update.bias.float().clone()
    bias[rows:] = NEVER
    return {path: replace(update, bias=bias)}
