"""What adapters' own tokenizers mean in the selections of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from http_support import BASE, BASE_SPEC, make_adapter

from quickchange_server.adapter_registry.composed_terms import LEAST_WEIGHT, WeightedName
from quickchange_server.adapter_registry.resolver import Catalog
from quickchange_server.errors import InvalidRequestError
from quickchange_store.canonical.canonical_adapter import ModuleShape
from quickchange_store.canonical.tokenizer_part import AddedToken, TokenizerChanges
from quickchange_store.store import Store

OWN = 8  # tokens of the base
MORE = TokenizerChanges(OWN + 1, (AddedToken(OWN, "<tool>"),))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    head = ModuleShape("linear", 4, OWN)
    spec = replace(BASE_SPEC, modules={**BASE_SPEC.modules, "lm_head": head}, output_head="lm_head")
    store = Store(tmp_path / "store")
    for value, (name, changes) in enumerate(
        {
            "plain": None,
            "more": MORE,
            "alike": MORE,
            "fewer": TokenizerChanges(OWN - 2),
            "templated": TokenizerChanges(OWN, template="{{ messages }}"),
        }.items()
    ):
        store.add(name, replace(make_adapter(float(value)), tokenizer=changes), spec)
    return Catalog(store, (BASE,), tokens=OWN + 2)


def test_requests_have_the_tokenizer_that_an_adapter_brings(catalog: Catalog) -> None:
    assert catalog.select("plain").tokenizer is None
    more, alike = catalog.select("more").tokenizer, catalog.select("alike").tokenizer
    assert more is not None
    assert alike is not None
    assert more.content == alike.content
    assert catalog.select("templated").tokenizer != more


def test_a_composition_has_one_tokenizer(catalog: Catalog) -> None:
    for names in (("plain", "more"), ("more", "alike"), ("templated", "plain")):
        terms = [WeightedName(name, 0.5) for name in names]
        assert catalog.select(BASE, terms).tokenizer is not None
    for names in (("more", "fewer"), ("more", "templated")):
        with pytest.raises(InvalidRequestError, match="one tokenizer"):
            catalog.select(BASE, [WeightedName(name, 0.5) for name in names])


@pytest.mark.parametrize("weight", [-1.0, LEAST_WEIGHT / 2])
def test_a_weight_that_lets_tokens_come_that_an_adapter_lacks_is_refused(
    catalog: Catalog, weight: float
) -> None:
    with pytest.raises(InvalidRequestError, match=f"{OWN - 2} of the base's {OWN} tokens"):
        catalog.select(BASE, [WeightedName("fewer", weight)])
    catalog.select(BASE, [WeightedName("fewer", LEAST_WEIGHT), WeightedName("plain", weight)])
    catalog.select(BASE, [WeightedName("more", weight)])
