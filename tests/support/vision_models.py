"""Tiny random checkpoints that also see: their text parts are small decoders of known kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

VOCABULARY = 120

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2, "hidden_size": 32, "embed_dim": 32}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_IMAGE = {"image_token_id": 100, "image_token_index": 100, "video_token_id": 101}
_VISION_MARKS = {"vision_start_token_id": 102, "vision_end_token_id": 103}

KINDS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_TOWER, "hidden_size": 64},
        **_VISION_MARKS,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 64, "intermediate_size": 48},
        **_VISION_MARKS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_TOWER,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_VISION_MARKS,
    },
    "gemma3": {
        "text_config": {**_TEXT, "model_type": "gemma3_text", "sliding_window": 8},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16},
        "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
    },
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _TOWER,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _TOWER,
    },
    "aya_vision": {
        "text_config": {**_TEXT, "model_type": "cohere2", "sliding_window": 8},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
    },
    "glm4v": {
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 64, "intermediate_size": 48},
        "image_start_token_id": 104,
        "image_end_token_id": 105,
        "video_start_token_id": 106,
        "video_end_token_id": 107,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma4_text",
            "sliding_window": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "pad_token_id": 0,
        },
        "vision_config": {**_TOWER, "model_type": "gemma4_vision"},
        "audio_config": None,
    },
}


def whole_model(kind: str) -> PreTrainedModel:
    """The model as transformers makes it, towers included, with eager attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **_IMAGE, **KINDS[kind])
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.float().eval()


def save_whole(kind: str, folder: Path) -> Path:
    whole_model(kind).save_pretrained(folder)
    return folder
