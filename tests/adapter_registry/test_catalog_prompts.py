"""What virtual tokens mean in the selections of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from http_support import BASE, make_adapter, make_turbo

from quickchange_server.adapter_registry.composed_terms import WeightedName
from quickchange_server.adapter_registry.resolver import Catalog
from quickchange_server.errors import InvalidRequestError
from quickchange_server.protocol import Component, Drafting
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.prompt_part import VirtualPrompt
from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.store import Store


def prompt(tokens: int) -> CanonicalAdapter:
    values = torch.ones(tokens, 4)
    return CanonicalAdapter(
        "LlamaForCausalLM", BASE, {}, prompt=VirtualPrompt("embeddings", values)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.add("sql", make_adapter(1.0))
    store.add("front", prompt(5))
    store.add("other", prompt(3))
    return store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return Catalog(store, (BASE,))


def test_a_prompt_says_how_many_tokens_it_takes(catalog: Catalog, store: Store) -> None:
    selection = catalog.select("front")
    assert selection.adapters == (Component(store.resolve("front").digest, virtual_tokens=5),)
    assert selection.virtual_tokens == 5
    assert catalog.select("sql").virtual_tokens == 0


def test_one_prompt_is_composed_with_loras(catalog: Catalog, store: Store) -> None:
    terms = [WeightedName("sql", 0.5), WeightedName("front", 1.0), WeightedName("other", 0.0)]
    selection = catalog.select(BASE, terms)
    assert set(selection.adapters) == {
        Component(store.resolve("sql").digest, 0.5),
        Component(store.resolve("front").digest, virtual_tokens=5),
    }
    compose(store, "named", [GivenTerm("sql", 0.5), GivenTerm("front")])
    assert catalog.select("named").adapters == selection.adapters


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([("front", 1.0), ("other", 1.0)], "one front"),
        ([("front", 0.5)], "its weight is 0.5"),
        ([("front", 1.0), ("front", 1.0)], "its weight is 2"),
    ],
)
def test_other_compositions_of_prompts_are_refused(
    catalog: Catalog, terms: list[tuple[str, float]], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        catalog.select(BASE, [WeightedName(*term) for term in terms])
    assert caught.value.param == "adapters"


def test_heads_beside_a_prompt_do_not_hide_it(catalog: Catalog, store: Store) -> None:
    version = store.add("both", replace(prompt(2), turbo=make_turbo(1.0).turbo))
    selection = catalog.select("both")
    assert selection.virtual_tokens == 2
    assert selection.drafting == Drafting(version.digest, lookup=True)
