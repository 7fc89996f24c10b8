"""Small random models with recurrent layers, made on the spot, and what transformers says."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import VOCABULARY
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
}
_DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_STATES_ALONE = {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64}
_ZAMBA = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    "attention_head_dim": 16,
    "mamba_d_state": 8,
}

RECURRENT: dict[str, dict[str, object]] = {
    # gated delta nets
    "qwen3_next": {**_DELTA_NET, **_EXPERTS, **_MIXED, "decoder_sparse_step": 2},
    "qwen3_5_text": {**_DELTA_NET, **_MIXED},
    "olmo_hybrid": {**_DELTA_NET, **_MIXED},
    # short convolutions
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **_EXPERTS},
    # Mamba-2
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA_2, **_MIXED, **_EXPERTS},
    "falcon_h1": {**_MAMBA_2, "head_dim": 8, "mamba_d_ssm": 64},
    "nemotron_h": {
        **_EXPERTS,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": {**_ZAMBA, "mamba_ngroups": 2, "n_mamba_heads": 4, "chunk_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8, "state_size": 8},
    # Mamba-1
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "mamba": _STATES_ALONE,
    "falcon_mamba": _STATES_ALONE,
    # lightning attention
    "minimax": {**_EXPERTS, **_MIXED, "block_size": 8, "head_dim": 8},
}


def make_recurrent(kind: str) -> PreTrainedModel:
    """A random float32 model with transformers' own (eager) attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_COMMON, **RECURRENT[kind]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            # Zamba's attention is scaled up: smaller weights, or every rounding error is a token's.
            nn.init.normal_(parameter, std=0.15 if kind == "zamba2" else 0.3)
    return model.float().eval()


def save_recurrent(kind: str, folder: Path) -> Path:
    """The same model on disk, in transformers' layout."""
    make_recurrent(kind).save_pretrained(folder)
    return folder


@torch.inference_mode()
def generated(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens by transformers' `generate`, with its cache."""
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
