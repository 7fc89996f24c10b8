"""DoRA through the engine equals PEFT token for token, beside LoRA and plain rows in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_peft import served, train
from peft import LoraConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def dora(**options: object) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", lora_alpha=12, use_dora=True, **options)


CONFIGS = {
    "attention": dora(r=8, target_modules=ATTENTION),
    "all": dora(r=16, target_modules="all-linear", use_rslora=True),
    "some of the fused": dora(r=3, target_modules=["v_proj", "up_proj"]),
    "patterns": dora(
        r=4, target_modules=MLP, rank_pattern={"up_proj": 11}, alpha_pattern={"up_proj": 3}
    ),
    "head and embedding": dora(r=5, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "trained biases": dora(r=4, target_modules=["q_proj", "k_proj"], bias="lora_only"),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=ATTENTION),
}


# llama: q, k, v and o with biases; qwen2: q, k and v alone
@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied"])
def test_dora_adapters_answer_as_in_peft(family: str, tmp_path: Path) -> None:
    trained = train(family, tmp_path, CONFIGS)
    got = served(trained)
    for name in CONFIGS:
        assert got[name] == trained.answers[name], name
        assert got[f"plain/{name}"] == trained.plain[name], name
    assert trained.answers["all"] != trained.plain["all"]
