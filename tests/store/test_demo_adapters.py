"""The demo adapters as they are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quickchange_store.canonical import BaseSpec, ModuleShape
from quickchange_store.demo import DEMO_ADAPTERS, DemoAdapter, publish_demo_adapters
from quickchange_store.demo.base import BASE_MODEL_ID
from quickchange_store.demo.training import DEMO_RECIPES
from quickchange_store.store import Store
from quickchange_store.training.recipe import LoraRecipe

MOST_BYTES = 8_000_000
_H, _KV, _MLP = 576, 192, 1536
_PROJECTIONS = {
    "self_attn.q_proj": (_H, _H),
    "self_attn.k_proj": (_H, _KV),
    "self_attn.v_proj": (_H, _KV),
    "self_attn.o_proj": (_H, _H),
    "mlp.gate_proj": (_H, _MLP),
    "mlp.up_proj": (_H, _MLP),
    "mlp.down_proj": (_MLP, _H),
}


@pytest.fixture(scope="module", params=sorted(DEMO_ADAPTERS))
def shipped(request: pytest.FixtureRequest) -> DemoAdapter:
    return DEMO_ADAPTERS[request.param]


@pytest.fixture(scope="module")
def smollm2_spec() -> BaseSpec:
    """The demo base's shapes, without the demo base."""
    modules = {
        f"model.layers.{i}.{name}": ModuleShape("linear", *shape)
        for i in range(30)
        for name, shape in _PROJECTIONS.items()
    }
    return BaseSpec("LlamaForCausalLM", BASE_MODEL_ID, modules, model_type="llama")


def files(adapter: DemoAdapter) -> list[Path]:
    return [file for file in adapter.path.iterdir() if file.is_file()]


def test_all_three_take_at_most_eight_megabytes() -> None:
    total = sum(f.stat().st_size for a in DEMO_ADAPTERS.values() for f in files(a))
    assert total <= MOST_BYTES


def test_tensors_are_bfloat16_and_finite_and_trained(shipped: DemoAdapter) -> None:
    tensors = load_file(shipped.path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)


def test_no_file_names_a_path_of_a_machine(shipped: DemoAdapter) -> None:
    for file in shipped.path.glob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:\\)', file.read_text()), file.name


def test_the_config_names_the_base_by_its_public_id(shipped: DemoAdapter) -> None:
    config = json.loads((shipped.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_MODEL_ID


def test_the_recipe_beside_it_is_the_one_that_the_command_follows(shipped: DemoAdapter) -> None:
    recorded = json.loads((shipped.path / "recipe.json").read_text())
    recipe = DEMO_RECIPES[shipped.name]
    assert recorded["examples"] == recipe.examples
    assert LoraRecipe.from_dict(recorded["lora"]) == recipe.lora


def test_publishing_adds_the_three_once(tmp_path: Path, smollm2_spec: BaseSpec) -> None:
    store = Store(tmp_path)
    assert publish_demo_adapters(store, smollm2_spec) == list(DEMO_ADAPTERS)
    assert set(store.names()) == set(DEMO_ADAPTERS)
    assert publish_demo_adapters(store, smollm2_spec) == []
    assert store.verify() == []


def test_the_example_prompt_is_of_the_tasks_own_form(shipped: DemoAdapter) -> None:
    from quickchange_store.demo.tasks import TASKS

    made = TASKS[shipped.name].examples("held-out", 1, seed=0)[0].prompt
    assert shipped.example_prompt[:5] == made[:5]
