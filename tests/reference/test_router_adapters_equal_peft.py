"""LoRA of routers, as PEFT's "all-linear" makes it, gives PEFT's own tokens in a mixed batch."""

from __future__ import annotations

import pytest
from mixed_peft import Trained, served, train
from peft import LoraConfig

ROUTERS = {  # others: gate.weight
    "gpt_oss": "router.weight",
    "granitemoe": "router.weight",
    "hunyuan_v1_moe": "gate.wg.weight",
    "phimoe": "router.weight",
}


def configs(family: str) -> dict[str, LoraConfig]:
    router = ROUTERS.get(family, "gate.weight")
    found = {
        "router": LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=[router]),
        "patterns": LoraConfig(
            r=3,
            lora_alpha=4,
            use_rslora=True,
            target_modules=["o_proj"],
            target_parameters=[router, "experts.down_proj"],
            rank_pattern={router.replace(".", r"\."): 11},
            alpha_pattern={rf"layers\.1\.\w+\.{router}": 9},
        ),
        "attention": LoraConfig(r=8, lora_alpha=12, target_modules=["o_proj"]),
    }
    if family != "phimoe":  # PEFT adds to what its router gives, which is no tensor
        found["all"] = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    if family == "gpt_oss":
        found["bias"] = LoraConfig(
            r=4, bias="lora_only", target_modules=[], target_parameters=[router]
        )
    return found


@pytest.fixture(
    scope="module",
    params=[
        "mixtral",
        "qwen3_moe",
        "olmoe",
        "gpt_oss",
        "phimoe",
        "deepseek_v3",
        "granitemoe",
        "hunyuan_v1_moe",
    ],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family = request.param
    return train(family, tmp_path_factory.mktemp(family), configs(family))


def test_adapters_with_and_without_a_router_and_none_in_one_batch(trained: Trained) -> None:
    said = served(trained)
    for name, answer in trained.answers.items():
        assert said[name] == answer, name
        assert said[f"plain/{name}"] == trained.plain[name], name
        assert answer != trained.plain[name], "the adapter changes nothing"
