"""Merged adapters equal PEFT's `add_weighted_adapter`, module by module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from tiny_models import make_model, save_model

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.combining.merging import MergeStrategy, Recipe, merge, module_seed
from quickchange_store.errors import UnsupportedFeatureError
from quickchange_store.importing import read_adapter

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EQUAL = {
    "a": {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 8},
    "b": {"r": 4, "target_modules": ATTENTION, "lora_alpha": 4},
    # Not with use_rslora: where the first adapter has it, PEFT scales the merged one by √r as well.
    "c": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 6},
}
UNEQUAL = {
    "a": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
    "b": {"r": 7, "target_modules": ["v_proj", "up_proj"]},
}
WEIGHTS = {"a": 0.7, "b": -1.2, "c": 2.0}


@dataclass
class Reference:
    """Adapters in PEFT's model, and in canonical form."""

    model: PeftModel
    adapters: dict[str, CanonicalAdapter]

    def recipe(self, strategy: MergeStrategy, **options: Any) -> Recipe:
        components = tuple((digest(a), WEIGHTS[name]) for name, a in self.adapters.items())
        return Recipe(strategy, components, **{"density": 0.4, **options})

    def merged(self, recipe: Recipe) -> CanonicalAdapter:
        by_digest = {digest(adapter): adapter for adapter in self.adapters.values()}
        return merge(recipe, [by_digest[key] for key, _ in recipe.components])

    def peft(self, recipe: Recipe, combination: str) -> dict[str, torch.Tensor]:
        """PEFT's updates by module, its random choices seeded as the recipe says."""
        names = {digest(adapter): name for name, adapter in self.adapters.items()}
        order = [names[key] for key, _ in recipe.components]
        with pytest.MonkeyPatch.context() as patch:
            for method in (
                "_generalized_task_arithmetic_weighted_adapter",
                "_svd_generalized_task_arithmetic_weighted_adapter",
            ):
                patch.setattr(LoraModel, method, self._seeding(getattr(LoraModel, method), recipe))
            self.model.add_weighted_adapter(
                order,
                [WEIGHTS[name] for name in order],
                "merged",
                combination_type=combination,
                density=recipe.density,
                majority_sign_method=recipe.sign_method,
            )
        try:
            return {
                path.removeprefix(PREFIX): target.get_delta_weight("merged").detach()
                for path, target in self._targets("merged")
            }
        finally:
            self.model.delete_adapter("merged")

    def _seeding(self, method: Callable[..., Any], recipe: Recipe) -> Callable[..., Any]:
        paths = {id(target): path for path, target in self._targets(None)}

        def seeded(model: LoraModel, *args: Any, **options: Any) -> Any:
            (path,) = {paths[id(argument)] for argument in args if id(argument) in paths}
            torch.manual_seed(module_seed(recipe, path.removeprefix(PREFIX)))
            return method(model, *args, **options)

        return seeded

    def _targets(self, adapter: str | None) -> Iterator[tuple[str, Any]]:
        for path, module in self.model.named_modules():
            held = {*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())}
            if hasattr(module, "get_delta_weight") and (adapter is None or adapter in held):
                yield path, module


def make(folder: Path, configs: dict[str, dict[str, Any]]) -> Reference:
    path = save_model("llama", folder / "base")
    spec = base_spec(str(path))
    model: PeftModel | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of embeddings without their weights
        for name, options in configs.items():
            config = LoraConfig(init_lora_weights=False, **options)
            if model is None:
                model = get_peft_model(make_model("llama"), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        assert model is not None
        model.save_pretrained(folder)
    adapters = {name: read_adapter(folder / name, spec).adapter for name in configs}
    return Reference(model, adapters)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make(tmp_path_factory.mktemp("equal"), EQUAL)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make(tmp_path_factory.mktemp("unequal"), UNEQUAL)


def assert_same(
    merged: CanonicalAdapter, theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert set(merged.updates) == set(theirs)
    for module, update in merged.updates.items():
        ours = update.scale * (update.b @ update.a)
        expected = theirs[module]
        assert expected.abs().max() > 0
        torch.testing.assert_close(
            ours.T if "embed" in module and ours.shape != expected.shape else ours,
            expected,
            atol=tolerance * float(expected.abs().max()),
            rtol=0,
        )


@pytest.mark.parametrize("sign_method", ["total", "frequency"])
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_equal_ranks_merge_as_peft_merges_factors(
    equal: Reference, strategy: MergeStrategy, sign_method: str
) -> None:
    recipe = equal.recipe(strategy, sign_method=sign_method)
    assert_same(equal.merged(recipe), equal.peft(recipe, strategy), 1e-6)


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_unequal_ranks_merge_as_peft_merges_whole_updates(
    unequal: Reference, strategy: MergeStrategy
) -> None:
    recipe = unequal.recipe(strategy)
    merged = unequal.merged(recipe)
    assert merged.max_rank == 7
    assert_same(merged, unequal.peft(recipe, f"{strategy}_svd"), 1e-5)


def test_density_1_keeps_everything_and_dare_linear_of_it_is_a_sum(unequal: Reference) -> None:
    recipe = unequal.recipe("dare_linear", density=1.0)
    merged = unequal.merged(recipe).updates["model.layers.1.mlp.up_proj"]
    whole = unequal.adapters["b"].updates["model.layers.1.mlp.up_proj"]
    expected = WEIGHTS["b"] * whole.scale * (whole.b @ whole.a)
    torch.testing.assert_close(merged.b @ merged.a, expected, atol=1e-5, rtol=1e-4)


def test_a_recipe_alone_decides_the_bytes(equal: Reference) -> None:
    recipe = equal.recipe("dare_ties")
    turned = replace(recipe, components=recipe.components[::-1])
    assert turned.key == recipe.key
    torch.manual_seed(1)
    first = digest(equal.merged(recipe))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert digest(equal.merged(turned)) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = replace(recipe, density=0.41)
    assert other.key != recipe.key
    assert digest(equal.merged(other)) != first


def test_narrow_adapters_stay_narrow(equal: Reference) -> None:
    adapters = {}
    for name, adapter in equal.adapters.items():
        narrow = {
            module: replace(update, a=update.a.bfloat16(), b=update.b.bfloat16())
            for module, update in adapter.updates.items()
        }
        adapters[name] = replace(adapter, updates=narrow)
    reference = Reference(equal.model, adapters)
    merged = reference.merged(reference.recipe("ties"))
    assert {update.a.dtype for update in merged.updates.values()} == {torch.bfloat16}


def test_what_is_more_than_a_lora_is_refused_by_its_module(equal: Reference) -> None:
    adapter = equal.adapters["a"]
    module = next(iter(adapter.updates))
    biased = replace(adapter.updates[module], bias=torch.ones(len(adapter.updates[module].b)))
    reference = Reference(
        equal.model, {"a": replace(adapter, updates={module: biased}), "b": equal.adapters["b"]}
    )
    with pytest.raises(UnsupportedFeatureError, match=module):
        reference.merged(reference.recipe("ties"))
