"""What `NAME[+TURBO]` means: adapters, their heads, and other adapters' heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quickchange_server.protocol import Component, Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.stored_parts import Invocation
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.combining.merging import MergeStrategy, Recipe, merge
from quickchange_store.errors import StoreError
from quickchange_store.importing import read_adapter
from quickchange_store.store import Store
from quickchange_training.evaluation.variants import EvaluatedAdapters, EvaluatedVariant

HIDDEN = 32


def heads(value: float) -> TurboHeads:
    block = DraftBlock(torch.full((HIDDEN, HIDDEN), value), torch.zeros(HIDDEN))
    return TurboHeads((block,), ((0,), (0,)))


@pytest.fixture(scope="module")
def store(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A LoRA, heads alone, a Turbo LoRA, and an alias of the LoRA that the heads draft for."""
    spec = base_spec(str(bench.model))
    lora = read_adapter(bench.loras["first"], spec).adapter
    store = Store(tmp_path_factory.mktemp("variants"))
    store.add("lora", lora, spec)
    store.add("heads", CanonicalAdapter(lora.architecture, "", {}, turbo=heads(0.1)), spec)
    both = CanonicalAdapter(lora.architecture, "", lora.updates, turbo=heads(0.2))
    store.add("turbo-lora", both, spec)
    store.alias("bound", "lora", turbo="heads")
    return store


@pytest.fixture(scope="module")
def digests(store: Store) -> dict[str, str]:
    return {name: store.resolve(name).digest for name in store.names()}


def variant(bench: Any, store: Store, text: str) -> EvaluatedVariant:
    adapters = EvaluatedAdapters(str(bench.model), store)
    found = adapters.variant(text)
    for component in found.components:
        adapters.load(component.digest)  # the engine will ask for it
    if found.drafting is not None and found.drafting.heads is not None:
        adapters.load(found.drafting.heads)
    return found


@pytest.mark.parametrize(
    ("text", "adapter", "drafter"),
    [
        ("lora", "lora", None),
        ("lora+auto", "lora", None),
        ("lora+heads", "lora", "heads"),
        ("bound", "lora", "heads"),
        ("bound+off", "lora", None),
        ("bound+turbo-lora", "lora", "turbo-lora"),
        ("turbo-lora", "turbo-lora", "turbo-lora"),
        ("turbo-lora+off", "turbo-lora", None),
        ("heads", None, "heads"),
        ("base", None, None),
        ("base+heads", None, "heads"),
        ("base+bound", None, "heads"),
    ],
)
def test_names_mean_adapters_and_heads(
    bench: Any,
    store: Store,
    digests: dict[str, str],
    text: str,
    adapter: str | None,
    drafter: str | None,
) -> None:
    found = variant(bench, store, text)
    assert found.components == (() if adapter is None else (Component(digests[adapter]),))
    expected = None if drafter is None else Drafting(digests[drafter], lookup=True)
    assert found.drafting == expected


def test_lookup_drafts_without_heads(bench: Any, store: Store) -> None:
    assert variant(bench, store, "turbo-lora+lookup").drafting == Drafting(lookup=True)


def test_a_sum_has_each_adapter_with_its_weight(
    bench: Any, store: Store, digests: dict[str, str]
) -> None:
    other = bench.loras["second"]
    found = variant(bench, store, f"lora*0.7, {other}*-0.4")
    assert found.label == "lora*0.7,second*-0.4"
    weights = {component.digest: component.weight for component in found.components}
    assert weights.pop(digests["lora"]) == 0.7
    assert list(weights.values()) == [-0.4]


def test_a_composition_under_a_name_is_its_terms(
    bench: Any, store: Store, digests: dict[str, str]
) -> None:
    compose(store, "both", [GivenTerm("lora", 0.5), GivenTerm("turbo-lora", 0.25)])
    terms = {c.digest: c.weight for c in variant(bench, store, "both").components}
    assert terms == {digests["lora"]: 0.5, digests["turbo-lora"]: 0.25}
    found = variant(bench, store, "both*2,lora*-1")
    assert found.components == (Component(digests["turbo-lora"], 0.5),)


def test_a_schedule_under_a_name_keeps_its_spans(
    bench: Any, store: Store, digests: dict[str, str]
) -> None:
    compose(store, "later", [GivenTerm("lora", 1.0, end=8), GivenTerm("lora", 0.5, begin=8)])
    found = variant(bench, store, "later*2")
    assert found.components == (
        Component(digests["lora"], 2.0, 0, 8),
        Component(digests["lora"], 1.0, 8, None),
    )


def test_an_activated_adapter_serves_a_prompt_from_its_last_invocation_on(
    bench: Any, store: Store, digests: dict[str, str]
) -> None:
    called = replace(store.load(digests["lora"]), invocation=Invocation((4, 5)))
    called_digest = store.add("called", called).digest
    found = variant(bench, store, "called")
    assert found.serving((4, 5, 9, 4, 5, 1)) == (Component(called_digest, begin=3),)
    assert found.serving((4, 9)) == ()
    both = variant(bench, store, "called*1,lora*0.5").serving((9, 4, 5))
    assert {(c.digest, c.begin) for c in both} == {(called_digest, 1), (digests["lora"], 0)}


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_a_merge_is_one_adapter_that_the_stores_merging_makes(
    bench: Any, store: Store, digests: dict[str, str], strategy: MergeStrategy
) -> None:
    adapters = EvaluatedAdapters(str(bench.model), store, density=0.3)
    found = adapters.variant(f"{strategy}(lora*0.7,{bench.loras['second']}*0.4)")
    spec = base_spec(str(bench.model))
    second = read_adapter(bench.loras["second"], spec).adapter
    by_digest = {digests["lora"]: store.load(digests["lora"]), digest(second): second}
    recipe = Recipe(strategy, tuple(zip(by_digest, (0.7, 0.4), strict=True)), 0.3)
    expected = digest(merge(recipe, [by_digest[each] for each, _ in recipe.components]))
    assert found.components == (Component(expected),)
    assert digest(adapters.load(expected)) == expected
    assert found.label == f"{strategy}(lora*0.7,second*0.4)"


@pytest.mark.parametrize("text", ["lora*", "lora*x", "lora*nan", "lora,lora*1", "*1", "base*1"])
def test_a_part_without_adapter_or_weight_is_refused(bench: Any, store: Store, text: str) -> None:
    with pytest.raises(StoreError, match=r"no adapter with a weight|adds nothing"):
        variant(bench, store, text)


def test_a_folder_is_labelled_by_its_name(bench: Any, store: Store) -> None:
    folder = bench.loras["second"]
    assert variant(bench, store, f"{folder}+heads").label == "second+heads"


def test_a_folder_with_a_plus_in_its_name_is_meant_as_a_whole(
    bench: Any, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "a+b"
    folder.symlink_to(bench.loras["second"])
    assert variant(bench, store, str(folder)).drafting is None


@pytest.mark.parametrize("text", ["lora+lora", "lora+nobody", "nobody+off", "lora+"])
def test_what_is_not_there_is_refused(bench: Any, store: Store, text: str) -> None:
    with pytest.raises(StoreError, match=r"no Turbo heads|nobody|''"):
        variant(bench, store, text)
