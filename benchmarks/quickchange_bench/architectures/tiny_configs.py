"""Tiny random models of any causal-LM type of transformers, made by its configuration class.

A configuration class gets small values for those sizes that it has, under whatever names it gives
them; types whose sizes depend on one another have values of their own below. Weights are large
random numbers, so that logits lie far apart: a last-bit difference can't change the best token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
MOST_PARAMETERS = 80_000_000
UNSET = object()  # for a size that a type must not be given

Options = Mapping[str, Any]

_HEADS = 4
_SIZES: Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "dim_ff": 96,
    "n_inner": 96,
    "dff": 96,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "decoder_layers": 3,
    "encoder_layers": 1,
    "num_attention_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # states between steps
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # positions
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 9,
    "attention_chunk_size": 16,
    "local_attention": 18,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
_NEVER_IF_NONE = frozenset({"sliding_window", "attention_chunk_size", "q_lora_rank", "n_inner"})
_DECODER: Options = {"is_decoder": True, "pad_token_id": 0}

# What single types need besides, or instead.
_SHORT_ROTARY: Options = {"rotary_dim": 8}
_TOKENS: Options = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_PADDED: Options = {"pad_token_id": 0, "is_decoder": True}
_PER_LAYER: Options = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
_GEMMA_3N: Options = {
    **_PER_LAYER,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
_INDEXED: Options = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_ROTARY_IN_SECTIONS: Options = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "mrope_section": [2, 3, 3],
}
_OWN: dict[str, Options] = {
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3],
        "cross_attn_k": 1,
        "encoder_config": {"hidden_size_global": 64, "cross_attn_k": 1},
        "decoder_config": {"hidden_size_global": 64, "cross_attn_k": 1},
    },
    "camembert": _PADDED,
    "codegen": _SHORT_ROTARY,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _ROTARY_IN_SECTIONS,
            "sliding_attention": _ROTARY_IN_SECTIONS,
        }
    },
    "cwm": _TOKENS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "moe_top_k": 2},
    },
    "data2vec-text": _PADDED,
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "electra": _DECODER,
    "emu3": {"text_config": _TOKENS},
    "ernie": _DECODER,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma3n_text": _GEMMA_3N,
    "gemma4": {"text_config": {**_PER_LAYER, **_TOKENS}},
    "gemma4_unified": {"text_config": _TOKENS},
    "gemma4_text": _PER_LAYER,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_hidden_layers": 4,
        "num_layers": 4,
        "window_size": 9,
    },
    "gptj": _SHORT_ROTARY,
    # Few passes: after more, float32 and float64 differ in the best token.
    "hrm_text": {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "megatron-bert": _DECODER,
    "mllama": {"text_config": _TOKENS},
    "modernbert-decoder": {**_TOKENS, "cls_token_id": 0, "sep_token_id": 0},
    "prophetnet": {
        "num_hidden_layers": UNSET,
        "num_decoder_layers": 3,
        "num_encoder_layers": 1,
        "pad_token_id": 0,
    },
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "rembert": _DECODER,
    "roberta": _PADDED,
    "roberta-prelayernorm": _PADDED,
    "roc_bert": {
        **_DECODER,
        "concat_input": False,
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
    },
    "roformer": _DECODER,
    "xlm": {"pad_token_id": 2, "causal": True},
    "xlm-roberta": _PADDED,
    "xlm-roberta-xl": _PADDED,
    "xlnet": {"max_position_embeddings": UNSET},
    "xmod": {**_PADDED, "default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "layer_types": UNSET,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Types under settings that change how they compute: a name of one's own, a type, its options.
_LONGROPE: Options = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 16,
    "factor": 16.0,
}
VARIANTS: dict[str, tuple[str, Options]] = {
    "phi3 (longrope)": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
    ),
    "llama (longrope)": ("llama", {"rope_parameters": _LONGROPE}),
    "llama (dynamic)": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "llama (yarn)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama (llama3)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral (window)": ("mistral", {"sliding_window": 9}),
    "qwen2 (window)": (
        "qwen2",
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "gpt2 (scaled by layer)": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
}

# Those that give something else token by token than all at once: positions scaled by the length so
# far, or a time step that transformers clamps only where it reads several tokens.
CACHED = frozenset({"llama (dynamic)", "llama (longrope)", "zamba2"})

# Falcon's eager attention adds ALiBi twice.
REFERENCE_ATTENTION = {"falcon (alibi)": "sdpa"}


def types() -> list[str]:
    """Every causal-LM type of the installed transformers, then the variants."""
    return [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *VARIANTS]


def tiny_config(name: str) -> PretrainedConfig:
    """A small configuration of a type or variant. Raises what its class raises."""
    model_type, own = VARIANTS.get(name, (name, {}))
    return _shrunk(CONFIG_MAPPING[model_type], {**_OWN.get(model_type, {}), **own})


def tiny_model(name: str, seed: int) -> PreTrainedModel:
    """A random float32 model on the CPU, with transformers' own (eager) attention.

    Raises ValueError where it is not small, and what transformers raises.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name}: {size} parameters are not small: give its sizes")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for path, parameter in model.named_parameters():
        if "norm" not in path.lower() and parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    made: PreTrainedModel = model
    return made


def _shrunk(kind: type[PretrainedConfig], own: Options) -> PretrainedConfig:
    """A configuration with small sizes, sub-configurations included."""
    default = kind()
    options: dict[str, Any] = {
        key: value for key, value in _SIZES.items() if _takes(kind, default, key)
    }
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = _HEADS
        if "head_dim" in options:  # the part that is rotated
            options["head_dim"] = options["qk_rope_head_dim"]
    options |= _layer_kinds(default, options)
    for key in getattr(kind, "sub_configs", None) or ():
        nested = getattr(default, key, None)
        if nested is not None:
            options[key] = _shrunk(type(nested), own.get(key, {})).to_dict()
    options |= {key: value for key, value in own.items() if not isinstance(options.get(key), dict)}
    return kind(**{key: value for key, value in options.items() if value is not UNSET})


def _layer_kinds(default: PretrainedConfig, options: Options) -> dict[str, Any]:
    """Layers of each kind that the class has by default: four, or as many as there are kinds."""
    kinds = {
        key: list(dict.fromkeys(held))
        for key in ("layer_types", "mlp_layer_types")
        if (held := getattr(default, key, None))
    }
    most = max((len(found) for found in kinds.values()), default=1)
    if most == 1:
        return {}
    layers = max(most, 4)
    counts = {key: layers for key in ("num_hidden_layers",) if key in options}
    settable = [key for key in kinds if not _read_only(type(default), key)]
    return counts | {
        key: [kinds[key][i % len(kinds[key])] for i in range(layers)] for key in settable
    }


def _read_only(kind: type[PretrainedConfig], key: str) -> bool:
    held = getattr(kind, kind.attribute_map.get(key, key), None)
    return isinstance(held, property) and held.fset is None


def _takes(kind: type[PretrainedConfig], default: PretrainedConfig, key: str) -> bool:
    """True if the class has such a size, which may be set."""
    if _read_only(kind, key):
        return False
    try:
        value = getattr(default, key, UNSET)
    except RuntimeError:
        return True  # it differs between layers by default
    return value is not UNSET and not (value is None and key in _NEVER_IF_NONE)
