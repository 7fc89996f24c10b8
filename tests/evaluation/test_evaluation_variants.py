"""What `NAME[+TURBO]` means: adapters, their heads, and other adapters' heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quickchange_server.protocol import Drafting
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
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
    for digest in (found.adapter, found.drafting and found.drafting.heads):
        if digest is not None:
            adapters.load(digest)  # the engine will ask for it
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
    assert found.adapter == (None if adapter is None else digests[adapter])
    expected = None if drafter is None else Drafting(digests[drafter], lookup=True)
    assert found.drafting == expected


def test_lookup_drafts_without_heads(bench: Any, store: Store) -> None:
    assert variant(bench, store, "turbo-lora+lookup").drafting == Drafting(lookup=True)


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
