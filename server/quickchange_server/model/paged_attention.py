"""Seam one: transformers' attention interface on a paged KV cache over the flattened batch.

Models call the function that is registered under their `_attn_implementation`; this one finds the
layer's pages by the calling module's `layer_idx`. No mask is built: the keys that a row sees follow
from its sequence's length. Knows nothing of scheduling.
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

# Arguments of other attention implementations that change the result and are not supported.
_UNSUPPORTED = ("s_aux", "sinks", "cu_seq_lens_q", "block_mask", "head_mask")


class Attend(Protocol):
    """Attention of one layer: query [T, Hq, D], key and value [T, Hkv, D] to [T, Hq, D]."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's keys and values in the KV cache."""

    kv_heads: int
    head_size: int


def check_shapes(layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise UnsupportedModelError for keys and values that one cache can't hold."""
    if key.shape != value.shape:
        raise UnsupportedModelError(
            f"layer {layer} has keys of shape {tuple(key.shape[1:])} but values of shape "
            f"{tuple(value.shape[1:])}; they must be equal"
        )


class ShapeRecorder:
    """An `Attend` that computes nothing and notes each layer's shape (a probe at load)."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        del scale, window, softcap
        check_shapes(layer, key, value)
        if layer in self.layers:
            raise UnsupportedModelError(
                f"layer {layer} calls the attention interface more than once a pass with keys and "
                "values of its own; its cache holds one set of them"
            )
        self.layers[layer] = LayerShape(key.shape[1], key.shape[2])
        return torch.zeros_like(query)


class PagedAttention:
    """An `Attend` on pages. Caches are [num_blocks, Hkv, block_size, D], one pair per layer."""

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
        self._caches = {
            layer: tuple(
                # Not zeroed, so that on a CPU only pages in use take memory: no kernel's result
                # depends on a slot that no token has written.
                torch.empty(
                    (num_blocks, shape.kv_heads, block_size, shape.head_size),
                    dtype=dtype,
                    device=device,
                )
                for _ in range(2)
            )
            for layer, shape in shapes.items()
        }

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        step = self._holder.step
        if step is None:
            raise RuntimeError("attention outside of an engine step")
        batch = step.attention
        k_cache, v_cache = self._caches[layer]
        kv_write_(key, value, k_cache, v_cache, batch.slots)
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
        )


def bytes_per_block(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block: keys and values of all layers."""
    values = sum(2 * shape.kv_heads * shape.head_size for shape in shapes.values())
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in transformers' calling convention: query [1, Hq, T, D] in, [1, T, Hq, D] out."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention uses {name!r}, not supported yet")
    if attention_mask is not None or dropout:
        raise UnsupportedModelError("the model passes an attention mask or dropout of its own")
    attend: Attend = getattr(module, ATTRIBUTE)
    out = attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Register the implementation with transformers. Idempotent."""
    AttentionInterface.register(NAME, _interface)
