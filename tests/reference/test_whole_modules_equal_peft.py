"""Norms, ends and linears that an adapter trains whole, in one batch: the tokens are PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_peft import served, train
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig


def lora(*saved: str, targets: str | list[str] = "all-linear", **options: object) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=targets,
        modules_to_save=list(saved) or None,
        **options,
    )


LLAMA: dict[str, PeftConfig] = {
    "norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "a norm of one layer": LNTuningConfig(target_modules=["layers.1.post_attention_layernorm"]),
    "lora and norms": lora("input_layernorm", "norm"),
    "lora and ends": lora("embed_tokens", "lm_head", targets=["q_proj"]),
    "lora and a linear": lora("layers.1.mlp.down_proj", use_dora=True),
    "ia3 and norms": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        modules_to_save=["post_attention_layernorm"],
    ),
    "lora": lora(),
}
HEADS: dict[str, PeftConfig] = {  # norms of attention heads
    "norms of heads": LNTuningConfig(target_modules=["q_norm", "k_norm"]),
    "norms": LNTuningConfig(target_modules=["norm", "input_layernorm", "k_norm"]),
    "lora": lora(),
    "lora and norms": lora("post_attention_layernorm", "q_norm"),
}
SANDWICHED: dict[str, PeftConfig] = {
    "norms": LNTuningConfig(
        target_modules=["post_attention_layernorm", "pre_feedforward_layernorm", "norm", "k_norm"]
    ),
    "lora and norms": lora("input_layernorm", "post_feedforward_layernorm"),
    "lora": lora(),
}
GPT2: dict[str, PeftConfig] = {
    "norms": LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
    "lora and norms": lora("ln_f", "c_proj", targets=["c_attn"]),
    "lora": lora(targets=["c_attn", "c_fc"]),
}
PHI: dict[str, PeftConfig] = {
    "norms": LNTuningConfig(target_modules=["input_layernorm", "final_layernorm"]),
    "lora and all biases": lora(targets=["q_proj", "fc1"], bias="all"),
    "lora and norms": lora("input_layernorm", "lm_head", targets=["v_proj"]),
}
TIED: dict[str, PeftConfig] = {
    "embedding": lora("embed_tokens", targets=["q_proj"]),
    "head": lora("lm_head", targets=["q_proj"]),
    "together": lora("embed_tokens", targets=["q_proj"], ensure_weight_tying=True),
    "lora of both": lora(targets=["embed_tokens", "v_proj"], ensure_weight_tying=True),
}
BASES = {
    "llama": LLAMA,
    "llama-tied": TIED,
    "qwen3": HEADS,
    "gemma": {name: LLAMA[name] for name in ("norms", "lora and norms", "lora")},
    "gemma3-untied": SANDWICHED,
    "gpt2": GPT2,
    "phi": PHI,
    "olmoe": HEADS,  # norms over all heads' outputs at once
    "modernbert-decoder": {"norms": LNTuningConfig(target_modules=["mlp_norm", "final_norm"])},
    "qwen3_moe": {**HEADS, "router": lora("mlp.gate", targets=["q_proj"])},
}


@pytest.mark.parametrize("family", BASES)
def test_modules_trained_whole_answer_as_in_peft(family: str, tmp_path: Path) -> None:
    configs = BASES[family]
    trained = train(family, tmp_path, configs, drawn_norms=True)
    got = served(trained)
    for name in configs:
        assert got[name] == trained.answers[name], name
        assert got[f"plain/{name}"] == trained.plain[name], name
    different = [name for name in configs if trained.answers[name] != trained.plain[name]]
    assert 2 * len(different) > len(configs)
