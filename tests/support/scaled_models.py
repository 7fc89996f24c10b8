"""Small random models whose positions are scaled by the text's length, and what transformers
generates with them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

LIMIT = 32  # tokens, up to which positions are not scaled

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": LIMIT,
}
_PARTIAL = {
    **_LONGROPE,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_PHI = {"original_max_position_embeddings": LIMIT}

# Frequencies chosen by the text's length.
SCALED: dict[str, dict[str, object]] = {
    "phi3": {"model_type": "phi3", **_PHI, "rope_parameters": _LONGROPE},
    "phi4-mini": {
        "model_type": "phi3",
        **_PHI,
        "partial_rotary_factor": 0.5,
        "rope_parameters": _PARTIAL,
    },
    "phimoe": {
        "model_type": "phimoe",
        **_PHI,
        "num_local_experts": 2,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    },
    "llama-longrope": {"model_type": "llama", "rope_parameters": _LONGROPE},
    "llama-dynamic": {
        "model_type": "llama",
        "max_position_embeddings": LIMIT,
        "rope_parameters": _DYNAMIC,
    },
    "qwen2-dynamic": {
        "model_type": "qwen2",
        "max_position_embeddings": LIMIT,
        "rope_parameters": _DYNAMIC,
    },
    "gemma3-dynamic": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "sliding_window": 9,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": LIMIT,
        "rope_parameters": {
            "full_attention": _DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
}
# The same frequencies for all lengths, or attention scaled by each row's own position.
UNSCALED: dict[str, dict[str, object]] = {
    "yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": LIMIT,
        },
    },
    "linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LIMIT,
        },
    },
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": LIMIT,
            "llama_4_scaling_beta": 0.5,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}


def make_scaled(kind: str, attention: str = "eager") -> PreTrainedModel:
    """A random float32 model."""
    torch.manual_seed(0)
    options = {**_COMMON, **(SCALED | UNSCALED)[kind]}
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model


def save_scaled(kind: str, folder: Path) -> Path:
    """The same model on disk, in transformers' layout."""
    make_scaled(kind).save_pretrained(folder)
    return folder


@torch.inference_mode()
def generated(folder: Path, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by transformers' own generation with a cache, by a model that is fresh: its
    frequencies also depend on what it read before."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    options = GenerationConfig(max_new_tokens=count, do_sample=False, use_cache=True)
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
    return tokens[0, len(prompt) :].tolist()
