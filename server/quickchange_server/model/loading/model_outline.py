"""A base model without its weights: the shapes, groups and sizes that serving it would have.

It is made on the meta device from the configuration and wrapped as any, so what is planned with it
is what an engine would do. Nothing is read but the configuration and the headers of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.architectures.attention_shims import admit_attention_classes
from quickchange_server.model.loading.layer_kinds import refuse_other_state
from quickchange_server.model.loading.model_dtype import (
    AUTO,
    stored_dtype,
    suitable_dtype,
    torch_dtype,
)
from quickchange_server.model.loading.model_loader import LoadedModel, prepare
from quickchange_server.model.quantized_linear import Quantization
from quickchange_store.base_model.base_source import BaseSource, language_model
from quickchange_store.base_model.base_weights import quantization_method
from quickchange_store.base_model.weight_reading import checkpoint_bytes
from quickchange_store.errors import BaseModelError


@dataclass(frozen=True)
class Outline:
    """A base on the meta device, and the bytes of weights that are stored quantised."""

    model: LoadedModel
    heads: int  # of queries
    stored_by: str | None  # how weights are quantised in the checkpoint
    stored_bytes: int | None  # of such a checkpoint; None: floats, or no files are there


def outline(
    path: str,
    *,
    dtype: str,
    device: str,
    bfloat16: bool,
    adapters: bool,
    quantization: Quantization,
    extra_vocabulary: int = 0,
) -> Outline:
    """The outline of what `--model` names. bfloat16: whether the device multiplies it.

    Raises UnsupportedModelError for a model that can't be served.
    """
    paged_attention.register()
    try:
        source = BaseSource.of(path)
        config = source.config()
        refuse_other_state(config)
        admit_attention_classes(config)
        stored = stored_dtype(config)
        chosen = (
            suitable_dtype(stored, device, bfloat16=bfloat16)
            if dtype == AUTO
            else torch_dtype(dtype)
        )
        made, config = language_model(config)
        method = quantization_method(config)
        size = checkpoint_bytes(source.where) if method is not None else None
        if method is not None:
            del config.quantization_config
        with torch.device("meta"):
            network = made._from_config(
                config,
                dtype=chosen,
                attn_implementation=paged_attention.NAME,
                # Before they are wrapped: the others look at the experts that were chosen.
                experts_implementation="batched_mm",
            )
    except (BaseModelError, ValueError) as error:
        raise UnsupportedModelError(f"model: {error}", param="model") from error
    for name, plan in network._get_dtype_plan(chosen).items():
        for parameter, tensor in network.named_parameters():
            if name in parameter:
                tensor.data = tensor.data.to(plan)
    model = prepare(
        network.eval(),
        adapters=adapters,
        quantization=quantization,
        dtype=chosen,
        extra_vocabulary=extra_vocabulary,
    )
    text = network.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    return Outline(model, heads, method, size)
