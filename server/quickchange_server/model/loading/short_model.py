"""A base with random weights and few layers, one of each kind, for what depends on shapes alone.

Only the configuration is read. Kernels are launched layer by layer with the same constants, so what
one layer of a kind launches is what all of the kind do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from quickchange_server.model import paged_attention
from quickchange_server.model.architectures.attention_shims import admit_attention_classes


def short_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The configuration's model on the CPU, ready for `prepare`, cut behind the last new kind."""
    paged_attention.register()
    admit_attention_classes(config)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its layers compute in the same floats
    return _made(_shortened(config), dtype, torch.device("cpu")).eval()


def _made(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=paged_attention.NAME, dtype=dtype
        )
    return model


def _shortened(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with as few of the first layers as have all kinds among them; the whole one
    if that can't be told."""
    whole = _kinds(config)
    count = max((whole.index(kind) + 1 for kind in whole), default=0)
    if not 0 < count < len(whole):
        return config
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(whole):
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return short if _kinds(short) == whole[:count] else config


def _kinds(config: PretrainedConfig) -> list[Any]:
    """What tells each layer from others: the shapes of its weights, and its kind of attention."""
    try:
        model = _made(config, torch.float32, torch.device("meta"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return []  # lists that hang together otherwise
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        return []
    named = getattr(text, "layer_types", None) or [None] * count
    return [
        (kind, type(layer), [(name, tuple(p.shape)) for name, p in layer.named_parameters()])
        for kind, layer in zip(named, lists[0], strict=True)
    ]
