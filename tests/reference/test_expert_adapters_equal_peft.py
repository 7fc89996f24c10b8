"""LoRA of experts, as PEFT saves it, gives PEFT's own tokens, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch
from engine_driver import Driver, make_engine, request
from mixed_peft import TOKENS, Trained, served, train
from peft import LoraConfig
from tiny_models import greedy, make_model

MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "both": LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=MATRICES),
    "down": LoraConfig(r=11, lora_alpha=3, target_modules=[], target_parameters=MATRICES[1:]),
    "linear": LoraConfig(r=6, lora_alpha=9, target_modules="all-linear"),  # routers, too
    "attention": LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj", "o_proj"]),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["k_proj"],
        target_parameters=MATRICES,
        rank_pattern={"down_proj": 9},
        alpha_pattern={r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
    ),
}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(request.param, tmp_path_factory.mktemp(request.param), CONFIGS)


def test_adapters_of_experts_and_of_attention_and_none_in_one_batch(trained: Trained) -> None:
    said = served(trained)
    for name, answer in trained.answers.items():
        assert said[name] == answer, name
        assert said[f"plain/{name}"] == trained.plain[name], name
        assert answer != trained.plain[name], "the adapter changes nothing"


def test_a_composition_is_the_weighted_sum_of_updates_of_experts(trained: Trained) -> None:
    weights = {"both": 0.5, "down": -0.7, "patterns": 0.4, "attention": 0.3}
    family = trained.path.parent.name.rstrip("0123456789")
    merged = make_model(family)
    with torch.no_grad():
        for name, weight in weights.items():
            for path, update in trained.adapters[name].updates.items():
                delta = weight * update.scale * (update.b @ update.a)
                parameter, _, expert = path.rpartition(".")
                if expert.isdecimal():
                    matrix = merged.get_parameter(parameter)[int(expert)]
                    matrix += delta if matrix.shape == delta.shape else delta.T
                else:
                    merged.get_submodule(path).weight += delta
    engine = make_engine(trained.path, trained.adapters.__getitem__)
    drive = Driver(engine)
    prompts = {"mixed": [5, 4, 3, 2, 1, 7, 8], "both": [1, 2, 3], "other": [9, 9, 1]}
    engine.submit(request("mixed", prompts["mixed"], list(weights.items()), max_tokens=TOKENS))
    engine.submit(request("both", prompts["both"], [("both", 1.0)], max_tokens=TOKENS))
    engine.submit(request("other", prompts["other"], list(weights.items()), max_tokens=TOKENS))
    drive.finish(*prompts)
    engine.close()
    for name in ("mixed", "other"):
        assert drive.tokens[name] == greedy(merged, prompts[name], TOKENS), name
