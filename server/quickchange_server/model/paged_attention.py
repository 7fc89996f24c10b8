"""Seam one: transformers' attention interface on a paged KV cache over the flattened batch.

Models call the function that is registered under their `_attn_implementation`; this one finds the
layer's pages by the calling module's `layer_idx`. No mask is built: the keys that a row sees follow
from its sequence's length. A layer that attends over another's keys and values (Gemma 3n and 4) is
known by passing that layer's own tensors; it has no pages, and reads the other's. Knows nothing of
scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from quickchange_kernels.attention.kv_write import kv_write_
from quickchange_kernels.attention.paged_attention_contract import paged_attention
from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.forward_context import StepHolder

NAME = "quickchange"
ATTRIBUTE = "quickchange_attend"

# What models pass on to every implementation, and what changes no result of this one.
_HARMLESS = frozenset(
    (
        "cache_position",
        "deterministic",
        "has_relative_attention_bias",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)


class Attend(Protocol):
    """Attention of one layer: query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] to [T, Hq, Dv].

    scale, window, softcap, sinks and slopes as in paged_attention_contract.py, except that sinks
    and slopes [Hq] may have any floating dtype.
    """

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's keys and values in the KV cache."""

    kv_heads: int
    head_size: int  # of queries and keys
    value_size: int
    shares: int | None = None  # the layer whose pages this one reads; None: it has its own


def check_shapes(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise UnsupportedModelError for keys and values that aren't one each of a step's tokens."""
    tokens = len(query)
    if key.shape[:2] != value.shape[:2] or len(key) != tokens or query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"layer {layer} has queries of shape {tuple(query.shape)}, keys of shape "
            f"{tuple(key.shape)} and values of shape {tuple(value.shape)} for {tokens} tokens; "
            "keys and values must have the same heads, and each token one of both"
        )


class ShapeRecorder:
    """An `Attend` that computes nothing and notes each layer's shape (a probe of one pass)."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # so that no memory is reused

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        del scale, window, softcap, sinks, slopes
        if layer in self.layers:
            raise UnsupportedModelError(
                f"layer {layer} attends more than once in a step; models with several attentions "
                "under one layer_idx can't be served"
            )
        check_shapes(layer, query, key, value)
        shares = next((at for at, held in self._held.items() if _same((key, value), held)), None)
        if shares is None:
            self._held[layer] = key, value
        self.layers[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2], shares)
        return query.new_zeros((*query.shape[:2], value.shape[2]))


def _same(some: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """True if the tensors are views of the same elements, on the meta device too."""

    def place(tensor: torch.Tensor) -> tuple[object, ...]:
        memory = tensor.untyped_storage()._cdata
        return memory, tensor.storage_offset(), tensor.shape, tensor.stride()

    return all(place(a) == place(b) for a, b in zip(some, other, strict=True))


class PagedAttention:
    """An `Attend` on pages: two caches [num_blocks, Hkv, block_size, D or Dv] for each layer."""

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        holder: StepHolder,
    ) -> None:
        self._holder = holder
        self._places = {layer: place for place, layer in enumerate(sorted(shapes))}
        self._caches = {
            layer: tuple(
                # Not zeroed, so that on a CPU only pages in use take memory: no kernel's result
                # depends on a slot that no token has written.
                torch.empty(
                    (num_blocks, shape.kv_heads, block_size, width), dtype=dtype, device=device
                )
                for width in (shape.head_size, shape.value_size)
            )
            for layer, shape in shapes.items()
            if shape.shares is None
        }
        self._sharing = {
            layer: self._caches[shape.shares]
            for layer, shape in shapes.items()
            if shape.shares is not None
        }

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = self._holder.step
        if step is None:
            raise RuntimeError("attention outside of an engine step")
        batch = step.attention
        if layer in self._caches:
            k_cache, v_cache = self._caches[layer]
            if step.virtual is not None:
                step.virtual.write_cache(self._places[layer], k_cache, v_cache)
            kv_write_(key, value, k_cache, v_cache, batch.slots)
        else:  # the keys and values are those that another layer has written in this step
            k_cache, v_cache = self._sharing[layer]
        return paged_attention(
            query,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.seq_lens,
            batch.query_start,
            scale,
            window,
            softcap,
            None if sinks is None else sinks.float(),
            None if slopes is None else slopes.float(),
        )


def bytes_per_block(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block: keys and values of all layers that have pages."""
    values = sum(
        shape.kv_heads * (shape.head_size + shape.value_size)
        for shape in shapes.values()
        if shape.shares is None
    )
    return values * block_size * dtype.itemsize


def install(model: nn.Module, attend: Attend) -> None:
    """Make every attention module of `model` use `attend`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, ATTRIBUTE, attend)


def _interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in transformers' calling convention: query [1, Hq, T, D] in, [1, T, Hq, Dv] out."""
    attend: Attend | None = getattr(module, ATTRIBUTE, None)
    if attend is None:
        raise _unsupported(module, "has no layer_idx, so its keys and values have no place")
    if is_causal is None:  # BigBird-Pegasus's decoder says only that it is one
        is_causal = getattr(module, "is_causal", True) or getattr(module, "is_decoder", False)
    if not is_causal:
        raise _unsupported(module, "lets tokens see those that follow them (is_causal)")
    if attention_mask is not None or dropout:
        raise _unsupported(module, "makes an attention mask or dropout of its own")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise _unsupported(module, f"gives the argument {name!r}")
    if len(query) != 1:
        raise _unsupported(module, f"cuts the batch in {len(query)}")
    out = attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def _unsupported(module: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__}: its attention {what}; not supported yet"
    )


def register() -> None:
    """Register the implementation with transformers. Idempotent."""
    AttentionInterface.register(NAME, _interface)
