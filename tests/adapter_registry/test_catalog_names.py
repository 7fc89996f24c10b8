"""What names in requests mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from http_support import BASE, make_adapter

from quickchange_server.adapter_registry.composed_terms import WeightedName
from quickchange_server.adapter_registry.resolver import Catalog, Selection, base_names
from quickchange_server.config import Settings
from quickchange_server.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from quickchange_server.protocol import Component
from quickchange_store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.add("sql", make_adapter(1.0))
    store.add("team/json", make_adapter(2.0))
    return store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return Catalog(store, (BASE,))


def test_the_base_name_means_no_adapter(catalog: Catalog) -> None:
    assert catalog.select(BASE) == Selection(BASE, (), "base")


def test_a_name_a_version_a_digest_prefix_and_an_alias_mean_the_same_content(
    catalog: Catalog, store: Store
) -> None:
    digest = store.resolve("sql").digest
    store.alias("prod", "sql@1")
    for reference in ("sql", "sql@1", f"sql@{digest[:8]}", "prod"):
        selection = catalog.select(reference)
        assert selection == Selection(reference, (Component(digest),), "sql")


def test_a_name_with_a_slash_is_found(catalog: Catalog, store: Store) -> None:
    assert catalog.select("team/json").adapters == (Component(store.resolve("team/json").digest),)


def test_a_new_version_changes_later_selections_only(catalog: Catalog, store: Store) -> None:
    before = catalog.select("sql")
    store.add("sql", make_adapter(3.0))
    assert catalog.select("sql").adapters != before.adapters
    assert catalog.select("sql@1").adapters == before.adapters


@pytest.mark.parametrize("name", ["nobody", "sql@9", "../sql", "/etc/passwd", "a" * 5000])
def test_what_does_not_exist_is_an_unknown_model(catalog: Catalog, name: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.select(name)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("wrong", "near"), [("sqll", "sql"), ("SQL", "sql"), ("team/jsn", "team/json"), ("xyz", None)]
)
def test_an_unknown_model_is_told_with_what_is_spelled_alike(
    catalog: Catalog, wrong: str, near: str | None
) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.select(wrong)
    advice = "." if near is None else f"; did you mean {near!r}?"
    lists = "GET /v1/models lists what there is"
    assert caught.value.message == f"model: there is no model {wrong!r}{advice} {lists}"


def test_names_that_the_caller_does_not_see_are_not_suggested(catalog: Catalog) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.select("sqll", sees=lambda name: name != "sql")
    assert "sql'" not in caught.value.message


def test_a_composition_has_each_adapter_once_with_its_summed_weight(
    catalog: Catalog, store: Store
) -> None:
    sql, json = store.resolve("sql").digest, store.resolve("team/json").digest
    terms = [WeightedName("sql", 0.5), WeightedName("team/json", -1.0), WeightedName("sql@1", 0.25)]
    selection = catalog.select(BASE, terms)
    assert selection.adapters == tuple(
        sorted([Component(sql, 0.75), Component(json, -1.0)], key=lambda c: c.digest)
    )
    assert selection.label == "+"


def test_the_order_of_a_composition_does_not_matter(catalog: Catalog) -> None:
    terms = [WeightedName("sql", 0.5), WeightedName("team/json", 2.0)]
    assert catalog.select(BASE, terms) == catalog.select(BASE, terms[::-1])


def test_weights_that_cancel_leave_the_plain_base(catalog: Catalog) -> None:
    terms = [WeightedName("sql", 0.5), WeightedName("sql@1", -0.5)]
    assert catalog.select(BASE, terms) == Selection(BASE, (), "base")


def test_a_composition_of_one_adapter_counts_as_that_adapter(catalog: Catalog) -> None:
    assert catalog.select(BASE, [WeightedName("sql", 0.5)]).label == "sql"


def test_a_composition_over_an_adapter_is_refused_with_both_names(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match=r"'sql'.*'tiny/base'") as caught:
        catalog.select("sql", [WeightedName("team/json", 1.0)])
    assert caught.value.param == "adapters"


def test_an_unknown_adapter_of_a_composition_is_named(catalog: Catalog) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.select(BASE, [WeightedName("sql", 1.0), WeightedName("nobody", 1.0)])
    assert caught.value.param == "adapters[1].id"


def test_infinite_sums_and_too_many_terms_are_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match="infinity"):
        catalog.select(BASE, [WeightedName("sql", 1e308)] * 3)
    with pytest.raises(InvalidRequestError, match="at most"):
        catalog.select(BASE, [WeightedName("sql", 1.0)] * 100)


def test_with_adapters_off_the_setting_is_named(store: Store) -> None:
    catalog = Catalog(store, (BASE,), adapters=False)
    assert catalog.select(BASE).adapters == ()
    with pytest.raises(ForbiddenError, match="QUICKCHANGE_ADAPTERS"):
        catalog.select("sql")


def test_the_base_is_named_by_the_setting_or_its_folder_or_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM2"
    folder.mkdir()
    assert base_names(Settings(model=str(folder), store=tmp_path)) == ("SmolLM2",)
    assert base_names(Settings(model="owner/name", store=tmp_path)) == ("owner/name",)
    named = Settings(model=str(folder), store=tmp_path, served_model_name="base")
    assert base_names(named) == ("base",)
