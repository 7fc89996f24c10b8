"""Small random models of several families, made on the spot, and what transformers says of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Large weights: logits far apart, so that a last-bit difference can't change the best token.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_ROUTED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
_SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "sliding_window": 9,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
_DECODER = {
    "decoder_layers": 3,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "is_decoder": True,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **_GROUPED, "attention_bias": True},
    "llama-tied": {"model_type": "llama", **_GROUPED, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_GROUPED},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 11},
    "gemma": {"model_type": "gemma", **_GROUPED, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 9,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 15.0,
        "query_pre_attn_scalar": 16,
    },
    # Norms of heads, and around each sub-layer, whose weights are stored minus one.
    "gemma3-untied": {
        "model_type": "gemma3_text",
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 9,
        "tie_word_embeddings": False,
    },
    # Looks like llama, but scales what each sub-layer adds.
    "granite": {"model_type": "granite", **_GROUPED, "residual_multiplier": 0.5},
    # Rotates neighbouring columns; attention and MLP side by side.
    "cohere": {"model_type": "cohere", **_GROUPED, "logit_scale": 1.0},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "stablelm": {"model_type": "stablelm", **_GROUPED, "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    # Cuts to the rows that are asked for in front of a linear, not in front of its LM head.
    "modernbert-decoder": {
        "model_type": "modernbert-decoder",
        "local_attention": 18,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "cls_token_id": 0,
        "sep_token_id": 0,
    },
    # Attention that doesn't go through the interface, each kind of its own.
    "codegen": {"model_type": "codegen", "rotary_dim": 8},
    "falcon": {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-7b": {"model_type": "falcon", "new_decoder_architecture": False},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "num_hidden_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 7,
    },
    "gpt_neox_japanese": {"model_type": "gpt_neox_japanese"},
    "gptj": {"model_type": "gptj", "rotary_dim": 8},
    # ALiBi: each adds its bias in a way of its own. (Falcon's eager attention adds it twice.)
    "bloom": {"model_type": "bloom"},
    "falcon-alibi": {
        "model_type": "falcon",
        "alibi": True,
        "multi_query": False,
        "new_decoder_architecture": False,
        "parallel_attn": False,
        "bias": True,
        "attn_implementation": "sdpa",
    },
    "mpt": {
        "model_type": "mpt",
        "d_model": 48,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"clip_qkv": 3.0},
    },
    "openai-gpt": {"model_type": "openai-gpt"},
    "xglm": {"model_type": "xglm", "ffn_dim": 80},
    # Linears that store their weights transposed.
    "gpt2": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
    "diffllama": {"model_type": "diffllama", **_GROUPED},
    "doge": {"model_type": "doge", **_GROUPED},
    "xlm": {
        "model_type": "xlm",
        "emb_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "causal": True,
        "pad_token_id": 96,
    },
    # Decoders of translators, which count positions from the start of what they are given.
    "bart": {"model_type": "bart", **_DECODER},
    "mvp": {"model_type": "mvp", **_DECODER},
    "pegasus": {"model_type": "pegasus", **_DECODER},
    # Makes logits of every row.
    "whisper": {"model_type": "whisper", **_DECODER, "max_target_positions": 512},
    # Begins to count positions behind the padding token's index.
    "roberta": {"model_type": "roberta", "is_decoder": True, "pad_token_id": 96},
    "roformer": {"model_type": "roformer", "is_decoder": True, "rotary_value": True},
    "roc_bert": {"model_type": "roc_bert", "is_decoder": True, "concat_input": False},
    # Experts: a layer's MLP has no one module that ends it.
    "mixtral": {
        "model_type": "mixtral",
        **_GROUPED,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_GROUPED,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **_GROUPED,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    # A router with a linear within it.
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe",
        **_GROUPED,
        "num_experts": 6,
        "moe_topk": 2,
        "head_dim": 16,
    },
    # A router that is a linear.
    "phimoe": {
        "model_type": "phimoe",
        **_GROUPED,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "olmoe": {"model_type": "olmoe", **_GROUPED, "num_experts": 6, "num_experts_per_tok": 2},
    # A dense layer first; a shared expert beside those that are chosen.
    "dots1": {
        "model_type": "dots1",
        **_GROUPED,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    # A score for each head that takes weight and gives nothing; every other layer has a window.
    # Experts have biases, are [in, out], and their gate and up take turns.
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_GROUPED,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    # Sinks and other heads in the layers with a window; values narrower than keys.
    "mimo_v2_flash": {
        "model_type": "mimo_v2_flash",
        **_GROUPED,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "sliding_window": 9,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    },
    # Keys and values of different widths, made from a latent of all heads.
    "deepseek_v2": {"model_type": "deepseek_v2", **_LATENT, **_ROUTED},
    "deepseek_v3": {"model_type": "deepseek_v3", **_LATENT, **_ROUTED},
    "minicpm3": {"model_type": "minicpm3", **_LATENT},
    # The last two layers attend over the keys and values of earlier ones.
    "gemma3n": {
        "model_type": "gemma3n_text",
        **_GROUPED,
        **_SHARING,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {"model_type": "gemma4_text", **_GROUPED, **_SHARING, "global_head_dim": 24},
}


def make_model(
    family: str, seed: int = 0, *, drawn_norms: bool = False, vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A random float32 model with transformers' own attention.

    vocabulary: its tokens; an LM head of a multiple of 16 is served in panels.
    drawn_norms: its norms have random weights and biases, too, as trained ones have.
    """
    torch.manual_seed(seed)
    options = {**_COMMON, "vocab_size": vocabulary, **FAMILIES[family]}
    attention = options.pop("attn_implementation", "eager")
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for name, parameter in model.named_parameters():
        if not any(
            part in name.lower() for part in ("norm", "ln_")
        ):  # biases start at zero: make them count
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        elif drawn_norms:
            parameter.data += torch.randn_like(parameter) * 0.2
    return model


def save_model(
    family: str,
    folder: Path,
    seed: int = 0,
    *,
    drawn_norms: bool = False,
    vocabulary: int = VOCABULARY,
) -> Path:
    """The same model on disk, in transformers' layout."""
    model = make_model(family, seed, drawn_norms=drawn_norms, vocabulary=vocabulary)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by transformers alone, without a cache: the plainest reference there is."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
