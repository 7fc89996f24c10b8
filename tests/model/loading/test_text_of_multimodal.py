"""The language model of a checkpoint that also sees: its tokens, its adapters, what is left out."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import greedy
from vision_models import KINDS, save_whole, whole_model

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.base_model.base_weights import load_base
from quickchange_store.formats.peft.lora import read_peft

PROMPTS = {"a": [7, 9, 20, 4, 11, 5, 31, 8, 2, 15, 44, 3], "b": [17, 3], "c": [50, 60, 70]}
WEIGHTS = "adapter_model.safetensors"


def adapted(kind: str, folder: Path) -> torch.nn.Module:
    """The whole model with a LoRA on its language model's linears, saved as PEFT does."""
    model = whole_model(kind)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj|o_proj|down_proj)",
        init_lora_weights=False,
    )
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_adapter_give_the_whole_models_tokens(kind: str, tmp_path: Path) -> None:
    path = save_whole(kind, tmp_path / "model")
    whole = whole_model(kind)
    expected = {name: greedy(whole, PROMPTS[name], 10) for name in ("a", "c")}
    expected["b"] = greedy(adapted(kind, tmp_path / "lora"), PROMPTS["b"], 10)
    adapter = read_peft(tmp_path / "lora", base_spec(path)).adapter
    engine = make_engine(path, load=lambda _: adapter)
    driver = Driver(engine)
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, [("lora", 1.0)] if name == "b" else ()))
    driver.finish(*PROMPTS)
    assert driver.tokens == expected


@pytest.mark.parametrize("kind", KINDS)
def test_towers_take_no_memory_and_make_no_warnings(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_whole(kind, tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load_base(str(path), dtype=torch.float32)
    assert [r.message for r in caplog.records if "weights" in r.message.lower()] == []
    names = {name for name, _ in loaded.named_parameters()}
    whole = {name for name, _ in whole_model(kind).named_parameters()}
    assert names < whole
    assert not any("vision_" in name or "visual" in name for name in names)


@pytest.mark.parametrize(
    ("trained", "kind"),
    [
        ("base_model.model.model.language_model.layers", "mistral3"),
        ("base_model.model.language_model.model.layers", "mistral3"),  # transformers 4
        ("base_model.model.model.layers", "mistral3"),  # trained on the language model alone
        ("base_model.model.model.layers", "qwen2_5_vl"),
    ],
)
def test_an_adapters_names_of_the_language_model_are_known(
    trained: str, kind: str, tmp_path: Path
) -> None:
    path = save_whole(kind, tmp_path / "model")
    adapted(kind, tmp_path / "lora")
    spec = base_spec(path)
    expected = read_peft(tmp_path / "lora", spec).adapter.updates
    file = tmp_path / "lora" / WEIGHTS
    own = "base_model.model.model.language_model.layers"
    save_file({n.replace(own, trained): t for n, t in load_file(file).items()}, file)
    config = tmp_path / "lora" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(r"(language_model|text_model)", "(layers)"))
    found = read_peft(tmp_path / "lora", spec).adapter.updates
    assert found.keys() == expected.keys()
    for module, update in found.items():
        assert torch.equal(update.b, expected[module].b)
