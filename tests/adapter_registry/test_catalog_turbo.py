"""What a request's `turbo` means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from http_support import BASE, make_adapter, make_turbo

from quickchange_server.adapter_registry.composed_terms import WeightedName
from quickchange_server.adapter_registry.resolver import Catalog, Selection
from quickchange_server.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from quickchange_server.protocol import Component, Drafting
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store

COMPOSITION = [WeightedName("sql", 0.5)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A LoRA, a Turbo, a Turbo LoRA, and an alias of the last with the Turbo on top."""
    store = Store(tmp_path / "store")
    store.add("sql", make_adapter(1.0))
    store.add("heads", make_turbo(2.0))
    store.add("both", make_turbo(3.0, lora=True))
    store.alias("fast", "both", turbo="heads")
    return store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return Catalog(store, (BASE,))


def digest_of(store: Store, name: str) -> str:
    return store.resolve(name).digest


@pytest.mark.parametrize(
    ("model", "drafter"),
    [
        (BASE, None),
        ("sql", None),
        ("both", "both"),
        ("both@1", "both"),
        ("fast", "heads"),
        ("heads", "heads"),
    ],
)
def test_auto_means_the_heads_that_the_models_name_binds(
    catalog: Catalog, store: Store, model: str, drafter: str | None
) -> None:
    selection = catalog.select(model)
    assert selection.drafter == drafter
    wanted = drafter and Drafting(digest_of(store, drafter), lookup=True)
    assert selection.drafting == wanted


def test_a_composition_binds_no_heads_even_of_its_only_adapter(catalog: Catalog) -> None:
    assert catalog.select(BASE, [WeightedName("both", 1.0)]).drafting is None


@pytest.mark.parametrize("model", [BASE, "sql", "both", "fast"])
def test_off_drafts_nothing(catalog: Catalog, model: str) -> None:
    assert catalog.select(model, turbo="off").drafting is None


@pytest.mark.parametrize("model", [BASE, "sql", "both", "fast", "heads"])
def test_lookup_drafts_without_heads(catalog: Catalog, model: str) -> None:
    selection = catalog.select(model, turbo="lookup")
    assert selection.drafting == Drafting(None, lookup=True)
    assert selection.drafter is None


@pytest.mark.parametrize("composition", [None, COMPOSITION])
@pytest.mark.parametrize(
    ("turbo", "drafter"),
    [("heads", "heads"), ("heads@1", "heads"), ("both", "both"), ("fast", "heads")],
)
def test_a_named_turbo_drafts_for_the_base_and_for_compositions(
    catalog: Catalog,
    store: Store,
    composition: list[WeightedName] | None,
    turbo: str,
    drafter: str,
) -> None:
    selection = catalog.select(BASE, composition, turbo)
    assert selection.drafting == Drafting(digest_of(store, drafter), lookup=True)
    assert selection.drafter == drafter
    assert selection.adapters == catalog.select(BASE, composition).adapters


def test_a_named_turbo_drafts_in_place_of_the_models_own(catalog: Catalog, store: Store) -> None:
    selection = catalog.select("both", turbo="heads")
    assert selection.drafting == Drafting(digest_of(store, "heads"), lookup=True)
    assert selection.adapters == (Component(digest_of(store, "both")),)


def test_a_turbo_alone_is_served_as_the_plain_base(catalog: Catalog) -> None:
    assert catalog.select("heads").adapters == ()
    assert catalog.select("heads", turbo="off") == Selection("heads", (), "base")


def test_a_turbo_alone_in_a_composition_is_refused_with_the_remedy(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match="set turbo to 'heads'") as caught:
        catalog.select(BASE, [*COMPOSITION, WeightedName("heads", 1.0)])
    assert caught.value.param == "adapters[1].id"


def test_a_name_without_heads_is_refused_with_the_remedy(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match='"off"') as caught:
        catalog.select(BASE, turbo="sql")
    assert caught.value.param == "turbo"


@pytest.mark.parametrize("turbo", ["nobody", "heads@9", "../heads", "", "Auto", "base"])
def test_a_turbo_that_does_not_exist_is_unknown(catalog: Catalog, turbo: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        catalog.select(BASE, turbo=turbo)
    assert caught.value.param == "turbo"


def test_without_prompt_lookup_heads_draft_alone_and_lookup_is_refused(store: Store) -> None:
    catalog = Catalog(store, (BASE,), prompt_lookup=False)
    assert catalog.select("both").drafting == Drafting(digest_of(store, "both"), lookup=False)
    with pytest.raises(ForbiddenError, match="QUICKCHANGE_PROMPT_LOOKUP") as caught:
        catalog.select(BASE, turbo="lookup")
    assert caught.value.param == "turbo"


def test_with_turbo_off_auto_means_none_and_asking_is_refused(store: Store) -> None:
    catalog = Catalog(store, (BASE,), turbo=False)
    assert catalog.select("both").drafting is None
    assert catalog.select("both", turbo="off").drafting is None
    for turbo in ("heads", "lookup", "nobody"):
        with pytest.raises(ForbiddenError, match="QUICKCHANGE_TURBO") as caught:
            catalog.select("both", turbo=turbo)
        assert caught.value.param == "turbo"


def test_with_adapters_off_lookup_still_drafts_and_heads_are_refused(store: Store) -> None:
    catalog = Catalog(store, (BASE,), adapters=False)
    assert catalog.select(BASE, turbo="lookup").drafting == Drafting(lookup=True)
    with pytest.raises(ForbiddenError, match="QUICKCHANGE_ADAPTERS") as caught:
        catalog.select(BASE, turbo="heads")
    assert caught.value.param == "turbo"


def test_a_new_version_of_a_bound_turbo_drafts_for_later_requests(
    catalog: Catalog, store: Store
) -> None:
    store.alias("pinned", "sql", turbo="heads@1")
    store.alias("floating", "sql", turbo="heads")
    first = digest_of(store, "heads")
    second = store.add("heads", make_turbo(4.0)).digest
    assert catalog.select("pinned").drafting == Drafting(first, lookup=True)
    assert catalog.select("floating").drafting == Drafting(second, lookup=True)


def owned(tenant: str) -> CanonicalAdapter:
    made = make_turbo(5.0)
    assert made.turbo is not None
    return replace(made, turbo=replace(made.turbo, tenant=tenant))


def test_heads_that_learned_from_a_tenants_requests_draft_for_it_alone(
    catalog: Catalog, store: Store
) -> None:
    store.add("acmes", owned("acme"))
    store.alias("live", "sql", turbo="acmes")
    wanted = Drafting(digest_of(store, "acmes"), lookup=True)
    for model in ("live", "acmes"):
        assert catalog.select(model, tenant="acme").drafting == wanted
        for other in ("globex", None):
            plain = catalog.select(model, tenant=other)
            assert (plain.drafting, plain.drafter) == (None, None)
            assert plain.adapters == catalog.select(model, tenant="acme").adapters
    assert catalog.select("sql", turbo="acmes", tenant="acme").drafting == wanted
    assert catalog.select(BASE, COMPOSITION, "acmes", tenant="acme").drafting == wanted
    for name in ("acmes", "acmes@1", "live"):
        with pytest.raises(ForbiddenError, match=r"^turbo: .* of another tenant"):
            catalog.select("sql", turbo=name, tenant="globex")
        assert not catalog.drafts_for(name, "globex")
        assert catalog.drafts_for(name, "acme")


@pytest.mark.parametrize("turbo", ["auto", "off", "lookup", "heads", "sql", "nothing"])
def test_what_is_nobodys_drafts_for_all(catalog: Catalog, turbo: str) -> None:
    assert catalog.drafts_for(turbo, "globex")
