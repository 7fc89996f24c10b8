"""Every kind of adapter that is trained: served as trained, resumed as if never interrupted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import VOCABULARY, greedy, make_model, save_model

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter
from quickchange_training.checkpoint import Checkpoints
from quickchange_training.examples import Encoded
from quickchange_training.lora.bottleneck_adapters import BottleneckedModel
from quickchange_training.lora.lora_recipe import (
    AdapterRecipe,
    BottleneckRecipe,
    DoraRecipe,
    Ia3Recipe,
    LoraRecipe,
    PeftTypeRecipe,
)
from quickchange_training.lora.lora_trainer import save_adapter, train_adapter
from quickchange_training.lora.peft_adapters import without_peft_noise

TOKENS = 10
LOOP: dict[str, Any] = {"lr": 0.05, "steps": 6, "batch_size": 4, "seed": 3}
TARGETS = ("q_proj", "v_proj", "down_proj")
EXAMPLES = [Encoded((4 + i, 2, 20 + i * 7 % 16, 30 + i, 3), prompt_length=2) for i in range(16)]


def of_type(name: str, **options: Any) -> PeftTypeRecipe:
    return PeftTypeRecipe(type=name, targets=TARGETS, peft_options=options, **LOOP)


RECIPES: dict[str, AdapterRecipe] = {
    "lora": LoraRecipe(rank=4, alpha=8, **LOOP),
    "dora": DoraRecipe(rank=4, alpha=8, targets=TARGETS, **LOOP),
    "ia3": Ia3Recipe(**LOOP),
    "houlsby": BottleneckRecipe(reduction_factor=16, **LOOP),
    "pfeiffer": BottleneckRecipe(
        placement="pfeiffer", reduction_factor=6, activation="swish", **LOOP
    ),
    "parallel": BottleneckRecipe(
        placement="parallel", reduction_factor=64, activation="gelu_new", **LOOP
    ),
    "vera": of_type("vera", r=8),
    "loha": of_type("LOHA", r=2),
    "lokr": of_type("LOKR", r=4),
    "hra": of_type("HRA", r=4),
    "miss": of_type("MISS", r=4),
    "vblora": of_type("VBLORA", r=3, num_vectors=16, vector_length=8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("kinds") / "base")


def saved_model(recipe: AdapterRecipe, folder: Path) -> torch.nn.Module:
    """The model with the adapter as it was saved, by who defines its format."""
    if not isinstance(recipe, BottleneckRecipe):
        with without_peft_noise():
            return PeftModel.from_pretrained(make_model("llama"), str(folder)).eval()
    model = BottleneckedModel(make_model("llama"), recipe).eval()
    tensors = load_file(folder / "adapter.safetensors")
    for name, parameter in model.tensors().items():
        parameter.data.copy_(tensors.pop(name))
    assert not tensors
    return model


def test_each_kind_is_served_as_trained_in_a_batch_with_all_others(
    base: Path, tmp_path: Path
) -> None:
    spec = base_spec(str(base))
    generator = random.Random(1)
    adapters: dict[str, CanonicalAdapter] = {}
    prompts: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    for name, recipe in RECIPES.items():
        trained, report = train_adapter(make_model("llama"), recipe, EXAMPLES)
        save_adapter(trained, tmp_path / name, "tiny", {})
        assert report.parameters > 0
        adapters[name] = read_adapter(tmp_path / name, spec).adapter
        prompts[name] = [generator.randrange(VOCABULARY) for _ in range(generator.randint(2, 20))]
        expected[name] = greedy(saved_model(recipe, tmp_path / name), prompts[name], TOKENS)
        expected[f"plain/{name}"] = greedy(make_model("llama"), prompts[name], TOKENS)
    engine = make_engine(base, adapters.__getitem__, max_sequences=24, max_batch_tokens=48)
    drive = Driver(engine)
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, [(name, 1.0)], max_tokens=TOKENS))
        engine.submit(request(f"plain/{name}", prompt, max_tokens=TOKENS))
    drive.finish(*expected)
    engine.close()
    assert drive.tokens == expected
    same = [name for name in RECIPES if expected[name] == expected[f"plain/{name}"]]
    assert len(same) < len(RECIPES) // 3, same


class StopError(Exception):
    """Ends a run as a crash would."""


class Interrupted(Checkpoints):
    """Checkpoints that end the run after one of them."""

    def save(self, state: Mapping[str, Any]) -> None:
        super().save(state)
        raise StopError


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_of_any_kind_gives_what_an_uninterrupted_one_gives(
    name: str, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    whole, report = train_adapter(make_model("llama"), recipe, EXAMPLES)
    with pytest.raises(StopError):
        train_adapter(
            make_model("llama"), recipe, EXAMPLES, checkpoints=Interrupted(tmp_path, "run", 4)
        )
    torch.manual_seed(99)  # whatever else has drawn random numbers in between
    resumed, again = train_adapter(
        make_model("llama"), recipe, EXAMPLES, checkpoints=Checkpoints(tmp_path, "run", 4)
    )
    assert again.train_loss == report.train_loss
    for folder, model in (("whole", whole), ("resumed", resumed)):
        save_adapter(model, tmp_path / folder, "tiny", {})
    files = [
        sorted((tmp_path / folder).glob("*.safetensors"))[0].read_bytes()
        for folder in ("whole", "resumed")
    ]
    assert files[0] == files[1]
