"""IA3 through the engine equals PEFT token for token, beside LoRA and plain rows in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_peft import served, train
from peft import IA3Config, LoraConfig


def ia3(**options: object) -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", **options)


CONFIGS = {
    "the model's defaults": ia3(),
    "outputs": ia3(target_modules=["q_proj", "o_proj", "lm_head"], feedforward_modules=[]),
    "inputs": ia3(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "up's output and down's input": ia3(
        target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "everything": ia3(target_modules="all-linear", feedforward_modules=r".*\.down_proj"),
    "down's output": ia3(target_modules=["down_proj", "gate_proj"], feedforward_modules=[]),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["v_proj", "up_proj"]),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied"])
def test_ia3_adapters_answer_as_in_peft(family: str, tmp_path: Path) -> None:
    trained = train(family, tmp_path, CONFIGS)
    got = served(trained)
    for name in CONFIGS:
        assert got[name] == trained.answers[name], name
        assert got[f"plain/{name}"] == trained.plain[name], name
    assert trained.answers["everything"] != trained.plain["everything"]
