"""The demo adapters as they are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from recorded_recipe import recorded_recipe
from safetensors.torch import load_file

from quickchange_store.canonical.canonical_adapter import BaseSpec, ModuleShape
from quickchange_store.importing import read_adapter
from quickchange_store.store import Store
from quickchange_training.demo import (
    DEMO_ADAPTERS,
    DEMO_ALIASES,
    DEMO_HEADS,
    DemoAdapter,
    publish_demo_adapters,
)
from quickchange_training.demo.chat_prompts import chat_prompts
from quickchange_training.demo.demo_adapters import DEMO_RECIPES
from quickchange_training.demo.demo_base import BASE_MODEL_ID
from quickchange_training.demo.demo_heads import DEMO_HEADS_RECIPES, demo_prompts
from quickchange_training.demo.tasks import TASKS
from quickchange_training.turbo.turbo_recipe import TurboRecipe

MOST_BYTES = 16_000_000
_VOCABULARY = 49152
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


@pytest.fixture(scope="module", params=sorted(DEMO_HEADS))
def heads(request: pytest.FixtureRequest) -> DemoAdapter:
    return DEMO_HEADS[request.param]


@pytest.fixture(scope="module")
def smollm2_spec() -> BaseSpec:
    """The demo base's shapes, without the demo base."""
    modules = {
        f"model.layers.{i}.{name}": ModuleShape("linear", *shape)
        for i in range(30)
        for name, shape in _PROJECTIONS.items()
    }
    modules["model.embed_tokens"] = ModuleShape("embedding", _VOCABULARY, _H)
    modules["lm_head"] = ModuleShape("linear", _H, _VOCABULARY)
    return BaseSpec(
        "LlamaForCausalLM", BASE_MODEL_ID, modules, model_type="llama", output_head="lm_head"
    )


def files(adapter: DemoAdapter) -> list[Path]:
    return [file for file in adapter.path.iterdir() if file.is_file()]


def test_adapters_and_heads_take_at_most_sixteen_megabytes() -> None:
    every = [*DEMO_ADAPTERS.values(), *DEMO_HEADS.values()]
    total = sum(f.stat().st_size for a in every for f in files(a))
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
    assert recorded_recipe(recorded["lora"]) == recipe.lora


def test_heads_are_bfloat16_and_finite_and_trained(
    heads: DemoAdapter, smollm2_spec: BaseSpec
) -> None:
    adapter = read_adapter(heads.path, smollm2_spec).adapter
    assert not adapter.updates
    assert adapter.turbo is not None
    for block in adapter.turbo.blocks:
        assert block.weight.dtype == torch.bfloat16
        assert bool(block.weight.isfinite().all())
        assert bool(block.weight.any())


def test_the_heads_folder_tells_the_recipe_that_the_command_follows(
    heads: DemoAdapter, smollm2_spec: BaseSpec
) -> None:
    told = json.loads((heads.path / "config.json").read_text())
    recipe = DEMO_HEADS_RECIPES[heads.name]
    assert told["base_model_name_or_path"] == BASE_MODEL_ID
    assert told["notes"]["prompts"] == recipe.prompts
    assert TurboRecipe(**told["notes"]["turbo"]) == recipe.turbo
    assert not re.search(r'"(/|~|[A-Z]:\\)', (heads.path / "config.json").read_text())
    turbo = read_adapter(heads.path, smollm2_spec).adapter.turbo
    assert turbo is not None
    assert turbo.heads == recipe.turbo.heads


def test_the_heads_drafts_are_worth_their_rows(heads: DemoAdapter) -> None:
    """Scores as their training measured them on prompts that they did not learn from."""
    held_out = json.loads((heads.path / "config.json").read_text())["notes"]["report"]["held_out"]
    assert held_out["tokens_a_step"] > (1.3 if heads.name == "base-heads" else 2.0)


def test_the_heads_prompts_are_of_the_training_split() -> None:
    recipe = DEMO_HEADS_RECIPES["order-json-heads"]
    made = {example.prompt for example in demo_prompts(recipe)[:50]}
    assert made <= {e.prompt for e in TASKS["order-json"].examples("train", recipe.prompts, 0)}


def test_chat_prompts_are_different_and_repeatable() -> None:
    made = chat_prompts(500, seed=3)
    assert len(set(made)) == 500
    assert chat_prompts(500, seed=3) == made
    assert chat_prompts(500, seed=4) != made


def test_more_chat_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are"):
        chat_prompts(10**6, seed=0)


def test_publishing_adds_adapters_heads_and_aliases_once(
    tmp_path: Path, smollm2_spec: BaseSpec
) -> None:
    store = Store(tmp_path)
    every = [*DEMO_ADAPTERS, *DEMO_HEADS, *DEMO_ALIASES]
    assert publish_demo_adapters(store, smollm2_spec) == every
    assert set(store.names()) == {*DEMO_ADAPTERS, *DEMO_HEADS}
    assert publish_demo_adapters(store, smollm2_spec) == []
    assert store.verify() == []


def test_an_alias_binds_heads_to_the_adapter_that_they_were_trained_on(
    tmp_path: Path, smollm2_spec: BaseSpec
) -> None:
    store = Store(tmp_path)
    publish_demo_adapters(store, smollm2_spec)
    for alias in DEMO_ALIASES.values():
        pointer = store.aliases()[alias.name]
        task = DEMO_HEADS_RECIPES[alias.turbo or alias.target].task
        assert pointer.name == (task or alias.target)
        assert pointer.turbo == alias.turbo


def test_the_example_prompt_is_of_the_tasks_own_form(shipped: DemoAdapter) -> None:
    made = TASKS[shipped.name].examples("held-out", 1, seed=0)[0].prompt
    assert shipped.example_prompt[:5] == made[:5]
