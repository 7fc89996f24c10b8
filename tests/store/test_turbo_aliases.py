"""Aliases that bind a Turbo, and which heads draft for a name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from quickchange_store.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    CorruptStoreError,
    InUseError,
    InvalidAdapterError,
    InvalidNameError,
    NameConflictError,
)
from quickchange_store.names import check_name
from quickchange_store.store import Store


@pytest.fixture
def store(tmp_path: Path, small_adapter: Any, turbo_adapter: Any) -> Store:
    """A LoRA "sql" and two versions of heads "fast"."""
    made = Store(tmp_path / "store")
    made.add("sql", small_adapter(1))
    made.add("fast", turbo_adapter(1))
    made.add("fast", turbo_adapter(5))
    return made


def digest(store: Store, reference: str) -> str:
    return store.resolve(reference).digest


def test_an_alias_drafts_with_the_heads_that_it_binds(store: Store) -> None:
    pointer = store.alias("prod", "sql", "fast@1")
    assert (str(pointer), pointer.turbo) == ("sql", "fast@1")
    resolved = store.resolve("prod")
    assert (resolved.name, resolved.digest) == ("sql", digest(store, "sql"))
    assert resolved.turbo == digest(store, "fast@1")


def test_a_bound_name_follows_and_a_bound_version_stays(store: Store) -> None:
    store.alias("floating", "sql", "fast")
    store.alias("fixed", "sql", f"fast@{digest(store, 'fast@2')[:8]}")
    store.rollback("fast")
    assert store.resolve("floating").turbo == digest(store, "fast@1")
    assert store.resolve("fixed").turbo == digest(store, "fast@2")


def test_heads_draft_for_their_own_version_and_a_lora_has_none(store: Store) -> None:
    assert store.resolve("fast@1").turbo == digest(store, "fast@1")
    assert store.resolve("sql").turbo is None
    store.alias("prod", "sql")
    assert store.resolve("prod").turbo is None


def test_a_bound_turbo_comes_before_the_versions_own_heads(
    store: Store, small_adapter: Any, turbo_adapter: Any
) -> None:
    both = dataclasses.replace(small_adapter(3), turbo=turbo_adapter(3).turbo)
    store.add("both", both)
    store.alias("own", "both")
    store.alias("other", "both", "fast")
    assert store.resolve("own").turbo == digest(store, "both")
    assert store.resolve("other").turbo == digest(store, "fast")


def test_setting_an_alias_anew_forgets_its_turbo(store: Store) -> None:
    store.alias("prod", "sql", "fast")
    store.alias("prod", "sql")
    assert store.resolve("prod").turbo is None


@pytest.mark.parametrize(
    ("turbo", "kind"),
    [
        ("sql", InvalidAdapterError),
        ("missing", AdapterNotFoundError),
        ("fast@9", AdapterNotFoundError),
        ("other-alias", NameConflictError),
        ("auto", InvalidNameError),
    ],
)
def test_a_turbo_that_can_not_draft_is_refused(
    turbo: str, kind: type[Exception], store: Store
) -> None:
    store.alias("other-alias", "fast")
    with pytest.raises(kind):
        store.alias("prod", "sql", turbo)
    assert "prod" not in store.aliases()


def test_heads_of_another_architecture_are_refused(store: Store, turbo_adapter: Any) -> None:
    store.add("phi", turbo_adapter(1, architecture="PhiForCausalLM"))
    with pytest.raises(BaseMismatchError, match="PhiForCausalLM"):
        store.alias("prod", "sql", "phi")


def test_heads_of_another_hidden_size_are_refused(
    store: Store, small_adapter: Any, turbo_adapter: Any, bases: Any
) -> None:
    store.add("narrow", small_adapter(2), bases("llama").spec)
    store.add("wide", turbo_adapter(1, hidden=32))
    store.alias("fits", "narrow", "wide")
    with pytest.raises(BaseMismatchError, match="hidden size of 4"):
        store.alias("prod", "narrow", "fast")


def test_what_an_alias_drafts_with_is_not_removed(store: Store) -> None:
    store.alias("prod", "sql", "fast@1")
    for reference in ("fast", "fast@1"):
        with pytest.raises(InUseError, match="'prod' drafts"):
            store.remove(reference)
    store.alias("prod", "sql", "fast")
    store.remove("fast@1")
    with pytest.raises(InUseError, match="'prod' drafts"):
        store.remove("fast")
    store.unalias("prod")
    store.remove("fast")


def test_a_bound_name_can_not_come_to_serve_what_has_no_heads(
    store: Store, small_adapter: Any, turbo_adapter: Any
) -> None:
    store.add("mixed", small_adapter(9))
    store.add("mixed", turbo_adapter(9))
    store.alias("prod", "sql", "mixed")
    with pytest.raises(InUseError, match="no heads"):
        store.add("mixed", small_adapter(8))
    with pytest.raises(InUseError, match="no heads"):
        store.rollback("mixed")
    assert store.resolve("mixed").version == 2
    store.alias("prod", "sql", "mixed@2")
    assert store.rollback("mixed").number == 1


def test_an_index_without_heads_is_as_it_was_before_heads(
    tmp_path: Path, small_adapter: Any
) -> None:
    store = Store(tmp_path)
    store.add("sql", small_adapter(1))
    store.alias("prod", "sql")
    content = (tmp_path / "index.json").read_text()
    assert json.loads(content)["format"] == 1
    assert "turbo" not in content


def test_an_index_with_heads_is_of_a_format_that_older_readers_refuse(store: Store) -> None:
    store.alias("prod", "sql", "fast@1")
    tree = json.loads((Path(store.location) / "index.json").read_text())
    assert tree["format"] == 2
    assert tree["aliases"]["prod"] == {"name": "sql", "version": None, "turbo": "fast@1"}
    assert Store(store.location).resolve("prod").turbo == digest(store, "fast@1")


@pytest.mark.parametrize("turbo", ["missing", "fast@7", "not a name"])
def test_an_index_that_binds_what_is_missing_is_damaged(turbo: str, store: Store) -> None:
    store.alias("prod", "sql", "fast")
    path = Path(store.location) / "index.json"
    tree = json.loads(path.read_text())
    tree["aliases"]["prod"]["turbo"] = turbo
    path.write_text(json.dumps(tree))
    with pytest.raises(CorruptStoreError, match="damaged"):
        Store(store.location).resolve("sql")


@pytest.mark.parametrize("name", ["auto", "off", "lookup", "Lookup"])
def test_what_a_request_says_of_its_turbo_is_no_name(name: str) -> None:
    with pytest.raises(InvalidNameError, match="reserved"):
        check_name(name)
