"""Every kind of adapter that is trained: served as trained, resumed as if never interrupted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import VOCABULARY, greedy, make_model, save_model

from quickchange_server.frontend.adapter_spans import activated
from quickchange_server.protocol import Component
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter
from quickchange_training.adapters.adapter_recipes import (
    AdapterRecipe,
    AloraRecipe,
    BottleneckRecipe,
    DoraRecipe,
    Ia3Recipe,
    LoraRecipe,
    PeftTypeRecipe,
)
from quickchange_training.adapters.adapter_trainer import attach, save_adapter, train_adapter
from quickchange_training.adapters.bottleneck_adapters import BottleneckedModel
from quickchange_training.adapters.peft_adapters import without_peft_noise
from quickchange_training.checkpoint import Checkpoints
from quickchange_training.errors import RecipeError
from quickchange_training.examples import Encoded

TOKENS = 10
LOOP: dict[str, Any] = {"lr": 0.05, "steps": 6, "batch_size": 4, "seed": 3}
TARGETS = ("q_proj", "v_proj", "down_proj")
INVOCATION = (2,)
EXAMPLES = [Encoded((4 + i, 2, 20 + i * 7 % 16, 30 + i, 3), prompt_length=2) for i in range(16)]


def of_type(name: str, targets: tuple[str, ...] = TARGETS, /, **options: Any) -> PeftTypeRecipe:
    return PeftTypeRecipe(type=name, targets=targets, peft_options=options, **LOOP)


RECIPES: dict[str, AdapterRecipe] = {
    "lora": LoraRecipe(rank=4, alpha=8, **LOOP),
    "alora": AloraRecipe(rank=4, alpha=8, invocation=INVOCATION, **LOOP),
    "dora": DoraRecipe(rank=4, alpha=8, targets=TARGETS, **LOOP),
    "ia3": Ia3Recipe(**LOOP),
    "houlsby": BottleneckRecipe(reduction_factor=16, **LOOP),
    "pfeiffer": BottleneckRecipe(
        placement="pfeiffer", reduction_factor=6, activation="swish", **LOOP
    ),
    "parallel": BottleneckRecipe(
        placement="parallel", reduction_factor=64, activation="gelu_new", **LOOP
    ),
    "BEFT": of_type("BEFT", ("q_proj", "v_proj")),
    "CARTRIDGE": of_type("CARTRIDGE", num_virtual_tokens=6),
    "DEFT": of_type("DEFT", r=4),
    "DELORA": of_type("DELORA", r=4),
    "GRALORA": of_type("GRALORA", r=4, gralora_k=2),
    "HRA": of_type("HRA", r=4),
    "IA3": of_type("IA3", feedforward_modules=["down_proj"]),
    "LN_TUNING": of_type("LN_TUNING", ("input_layernorm", "norm")),
    "LOHA": of_type("LOHA", r=2),
    "LOKR": of_type("LOKR", r=4),
    "LORA": of_type("lora", r=4, use_rslora=True),
    "MISS": of_type("MISS", r=4),
    "PREFIX_TUNING": of_type("PREFIX_TUNING", num_virtual_tokens=5),
    "PROMPT_TUNING": of_type("PROMPT_TUNING", num_virtual_tokens=4),
    "PSOFT": of_type("PSOFT", r=4),
    "PVERA": of_type("PVERA", r=8),
    "P_TUNING": of_type("P_TUNING", num_virtual_tokens=3, encoder_hidden_size=32),
    "TINYLORA": of_type("TINYLORA"),
    "TRAINABLE_TOKENS": of_type(
        "TRAINABLE_TOKENS", ("embed_tokens",), token_indices=list(range(2, 40))
    ),
    "UNILORA": of_type("UNILORA"),
    "VBLORA": of_type("VBLORA", r=3, num_vectors=16, vector_length=8),
    "VERA": of_type("vera", r=8),
}


def test_every_type_that_can_be_chosen_is_among_them() -> None:
    types = {r.peft_type for r in RECIPES.values() if isinstance(r, PeftTypeRecipe)}
    with pytest.raises(RecipeError) as refused:
        attach(make_model("llama"), of_type("OFT"))
    assert f"choose {', '.join(sorted(types))}" in str(refused.value)


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
        prompts[name] += (*INVOCATION, 7, 8)
        expected[name] = greedy(saved_model(recipe, tmp_path / name), prompts[name], TOKENS)
        expected[f"plain/{name}"] = greedy(make_model("llama"), prompts[name], TOKENS)
    engine = make_engine(base, adapters.__getitem__, max_sequences=48, max_batch_tokens=96)
    drive = Driver(engine)
    for name, prompt in prompts.items():
        plain = request(f"plain/{name}", prompt, max_tokens=TOKENS)
        engine.submit(plain)
        engine.submit(
            replace(plain, request_id=name, adapters=serving(adapters[name], name, prompt))
        )
    drive.finish(*expected)
    engine.close()
    assert drive.tokens == expected
    same = [name for name in RECIPES if expected[name] == expected[f"plain/{name}"]]
    assert len(same) < len(RECIPES) // 3, same


def serving(adapter: CanonicalAdapter, name: str, prompt: list[int]) -> tuple[Component, ...]:
    """The adapter, which the engine knows by `name`, as a request for the prompt has it."""
    invocation = adapter.invocation
    components = [Component(name, virtual_tokens=adapter.virtual_tokens)]
    return activated(components, {name: invocation.tokens} if invocation else {}, prompt)


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
