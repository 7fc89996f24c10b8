"""PEFT's tuners beside LoRA in one batch: greedy float32 output is PEFT's, token for token."""

from __future__ import annotations

import pytest
from mixed_peft import Trained, served, train
from peft import (
    AdaLoraConfig,
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PsoftConfig,
    PveraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "tokens of a lora": LoraConfig(
        r=4, target_modules=TARGETS, trainable_token_indices=[1, 5, 9, 40, 41]
    ),
    "adalora": AdaLoraConfig(init_r=4, total_step=10, target_modules=TARGETS),
    "deft": DeftConfig(r=4, target_modules=TARGETS),
    "delora": DeloraConfig(r=4, target_modules=TARGETS),
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
    "loha": LoHaConfig(r=3, target_modules=TARGETS),
    "lokr": LoKrConfig(r=4, target_modules=TARGETS),
    "miss": MissConfig(r=4, target_modules=TARGETS),
    "psoft": PsoftConfig(r=4, target_modules=TARGETS),
    "pvera": PveraConfig(r=8, target_modules=TARGETS),
    "tinylora": TinyLoraConfig(target_modules=TARGETS),
    "tokens": TrainableTokensConfig(
        token_indices=list(range(0, 90, 3)), target_modules=["embed_tokens"]
    ),
    "unilora": UniLoraConfig(target_modules=TARGETS),
    "vblora": VBLoRAConfig(num_vectors=16, vector_length=8, topk=2, r=3, target_modules=TARGETS),
    "vera": VeraConfig(r=8, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train("llama", tmp_path_factory.mktemp("tuners"), CONFIGS)


def test_each_adapter_answers_as_peft_in_a_batch_with_all_others(trained: Trained) -> None:
    tokens = served(trained)
    for name in CONFIGS:
        assert tokens[name] == trained.answers[name], name
        assert tokens[f"plain/{name}"] == trained.plain[name], name


def test_the_adapters_do_something(trained: Trained) -> None:
    different = [name for name in CONFIGS if trained.answers[name] != trained.plain[name]]
    assert len(different) > len(CONFIGS) // 2
