"""Tiny checkpoints stored quantised, each by the library that serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 200


def float_model(family: str = "llama") -> PreTrainedModel:
    """A random model whose widths quantisers can divide."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()


def _bitsandbytes(folder: Path, family: str, **options: Any) -> None:
    from transformers import BitsAndBytesConfig

    _quantize_on_load(folder, family, BitsAndBytesConfig(**options))


def _torchao(folder: Path, family: str, kind: str) -> None:
    import torchao.quantization
    from transformers import TorchAoConfig

    _quantize_on_load(folder, family, TorchAoConfig(getattr(torchao.quantization, kind)()))


def _quantize_on_load(folder: Path, family: str, config: Any) -> None:
    float_model(family).save_pretrained(folder / "float")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)


def _compressed_tensors(folder: Path, family: str, **scheme: dict[str, Any]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = float_model(family)
    args = {name: QuantizationArgs(**fields) for name, fields in scheme.items()}
    all_linears = QuantizationScheme(targets=["Linear"], **args)
    config = QuantizationConfig(config_groups={"all": all_linears}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    rule = args["weights"]
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            grouped = module.weight.detach().unflatten(
                1, (-1, rule.group_size or module.in_features)
            )
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), rule)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def _fp8_blocks(folder: Path, family: str) -> None:
    """Weights as DeepSeek V3 stores them: float8, with a scale for each block of 64 · 64."""
    model = float_model(family)
    state = model.state_dict()
    stored = {}
    for name, weight in state.items():
        stored[name] = weight
        if weight.ndim == 2 and "layers" in name:
            blocks = weight.unflatten(1, (-1, 64)).unflatten(0, (-1, 64))  # [r, 64, c, 64]
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            stored[name] = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    model.config.quantization_config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
        "modules_to_not_convert": ["lm_head"],
    }
    model.config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


_INT = {"type": "int", "symmetric": True}
_PER_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True, "num_bits": 8}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}

KINDS: dict[str, Callable[[Path, str], None]] = {
    "compressed-tensors-w4a16": lambda folder, family: _compressed_tensors(
        folder, family, weights={**_INT, "num_bits": 4, "strategy": "group", "group_size": 32}
    ),
    "compressed-tensors-w8a16": lambda folder, family: _compressed_tensors(
        folder, family, weights={**_INT, "num_bits": 8, "strategy": "channel"}
    ),
    "compressed-tensors-fp8": lambda folder, family: _compressed_tensors(
        folder, family, weights=_FP8, input_activations={**_PER_TOKEN, "type": "float"}
    ),
    "compressed-tensors-w8a8": lambda folder, family: _compressed_tensors(
        folder,
        family,
        weights={**_INT, "num_bits": 8, "strategy": "channel"},
        input_activations={**_PER_TOKEN, "type": "int"},
    ),
    "torchao-int8": lambda folder, family: _torchao(folder, family, "Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": lambda folder, family: _torchao(
        folder, family, "Int8DynamicActivationInt8WeightConfig"
    ),
    "torchao-float8": lambda folder, family: _torchao(folder, family, "Float8WeightOnlyConfig"),
    "bitsandbytes-8bit": lambda folder, family: _bitsandbytes(folder, family, load_in_8bit=True),
    "bitsandbytes-4bit": lambda folder, family: _bitsandbytes(
        folder,
        family,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "fp8-blocks": _fp8_blocks,
}

# Those that round activations too: a last bit may move one to the next code, and bitsandbytes
# treats columns with outliers by what else is in the batch.
ROUNDING = {
    *("compressed-tensors-fp8", "compressed-tensors-w8a8", "torchao-int8-dynamic"),
    "bitsandbytes-8bit",
}


class PackedLinear(nn.Module):
    """Shaped as GPTQ's and AWQ's linears: packed buffers, features, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1) / 7
        codes = (linear.weight.detach() / scales[:, None]).round().clamp(-8, 7).to(torch.int32) + 8
        packed = torch.zeros(self.out_features, self.in_features // 8, dtype=torch.int32)
        for place in range(8):
            packed |= codes[:, place::8] << (4 * place)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([(self.qweight >> (4 * place)) & 15 for place in range(8)], -1)
        weight = (codes.flatten(1) - 8) * self.scales[:, None]
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def packed_model(family: str, attention: str) -> PreTrainedModel:
    """A tiny model, all its linears packed but the LM head."""
    model = make_model(family)
    model.set_attn_implementation(attention)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PackedLinear(module))
    return model
