"""Tiny models as GGUF files, by gguf's own writer, and what a reader must make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 256, 2, 4, 2, 512
TOKENS = 300
_QUANTIZED = {"Q4_K": 144, "Q6_K": 210, "Q5_K": 176, "Q4_0": 18, "Q8_0": 34}


def _names(layer: int) -> dict[str, str]:
    block, here = f"blk.{layer}", f"model.layers.{layer}"
    return {
        f"{block}.attn_norm.weight": f"{here}.input_layernorm.weight",
        f"{block}.attn_q.weight": f"{here}.self_attn.q_proj.weight",
        f"{block}.attn_k.weight": f"{here}.self_attn.k_proj.weight",
        f"{block}.attn_v.weight": f"{here}.self_attn.v_proj.weight",
        f"{block}.attn_output.weight": f"{here}.self_attn.o_proj.weight",
        f"{block}.ffn_norm.weight": f"{here}.post_attention_layernorm.weight",
        f"{block}.ffn_gate.weight": f"{here}.mlp.gate_proj.weight",
        f"{block}.ffn_up.weight": f"{here}.mlp.up_proj.weight",
        f"{block}.ffn_down.weight": f"{here}.mlp.down_proj.weight",
    }


def _as_llama_cpp_orders(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k in pairs, as llama.cpp rotates them."""
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


def _as_transformers_orders(weight: torch.Tensor, heads: int) -> torch.Tensor:
    out, width = weight.shape
    pairs = weight.view(heads, out // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(out, width)


def write_llama(
    path: Path,
    kind: str,
    *,
    fields: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    pre: str = "smollm",
) -> PreTrainedModel:
    """Write a random Llama whose matrices are stored as `kind`; returns the model as it then is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(TOKENS)
    _add_tokenizer(writer, pre)
    for name, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name, value)
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for layer in range(LAYERS):
        names |= _names(layer)
    for stored, own in names.items():
        parameter = model.get_parameter(own)
        heads = HEADS if ".attn_q." in stored else KV_HEADS if ".attn_k." in stored else None
        weight = parameter.detach()
        if heads is not None:
            weight = _as_llama_cpp_orders(weight, heads)
        number = GGMLQuantizationType.F32 if weight.ndim == 1 else GGMLQuantizationType[kind]
        raw = _stored(weight.numpy(), number)
        writer.add_tensor(stored, raw, raw_dtype=number)
        kept = torch.from_numpy(dequantize(raw, number).reshape(weight.shape).copy())
        parameter.data = kept if heads is None else _as_transformers_orders(kept, heads)
    for stored, values in (extra or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _stored(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    try:
        return quantize(weight, kind)
    except NotImplementedError:  # gguf writes no K-quants: blocks of random codes, small scales
        return _random_blocks(weight.shape, kind)


def _random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    size = _QUANTIZED[kind.name]
    generator = np.random.default_rng(shape[0])
    blocks = generator.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    zero = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    if kind.name == "Q6_K":
        blocks[..., -2:] = scale
    else:  # Q4_K and Q5_K: scale, then minimum
        blocks[..., 0:2], blocks[..., 2:4] = scale, zero
    return blocks.reshape(shape[0], -1)


def _add_tokenizer(writer: GGUFWriter, pre: str) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "12", "he", "ll"]
    tokens += [f"<unused{i}>" for i in range(TOKENS - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (TOKENS - 2)])
    writer.add_token_merges(["1 2", "h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
