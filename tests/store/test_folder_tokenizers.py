"""Tokenizers in adapters' folders: what is kept of them, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grown_vocabulary import ADDED, OWN_TEMPLATE, grown_tokenizer, save_base, train_grown
from peft import LoraConfig
from tiny_models import VOCABULARY

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest, load, load_tokenizer, write
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.combining.merging import Recipe, merge
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.exporting import export_adapter
from quickchange_store.importing import read_adapter

PLAIN = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama-tied", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def spec(base: Path) -> BaseSpec:
    return base_spec(str(base))


def grown(base: Path, folder: Path, **options: Any) -> Path:
    train_grown(base, folder, PLAIN, **options)
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    edit(tree)
    file.write_text(json.dumps(tree))
    return folder


def test_tokens_template_and_ends_are_part_of_the_digest(
    base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    first = read_adapter(grown(base, tmp_path / "a"), spec).adapter
    assert first.tokenizer is not None
    assert [(t.id, t.content) for t in first.tokenizer.tokens] == [
        (VOCABULARY + at, content) for at, content in enumerate(ADDED)
    ]
    assert first.tokenizer.template == OWN_TEMPLATE
    found = {digest(first)}
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    found.add(digest(read_adapter(tmp_path / "a", spec).adapter))
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [98, 96]}')
    ended = read_adapter(tmp_path / "a", spec).adapter
    assert ended.tokenizer is not None
    assert ended.tokenizer.ends == (98,)  # the base ends with 96 itself
    found.add(digest(ended))
    edited(tmp_path / "a", lambda tree: tree["added_tokens"][-1].update(special=False))
    found.add(digest(read_adapter(tmp_path / "a", spec).adapter))
    assert len(found) == 4


def test_the_part_is_read_back_without_tensors(base: Path, spec: BaseSpec, tmp_path: Path) -> None:
    adapter = read_adapter(grown(base, tmp_path / "a"), spec).adapter
    file = tmp_path / "stored"
    with file.open("wb") as stream:
        write(adapter, stream)
    assert load(file).tokenizer == adapter.tokenizer == load_tokenizer(file)


def test_the_bases_own_tokenizer_in_a_folder_changes_nothing(
    base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    folder = grown(base, tmp_path / "a", grow=False)
    without = read_adapter(folder, spec).adapter
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((base / name).read_bytes())
    assert digest(read_adapter(folder, spec).adapter) == digest(without)


def test_rules_that_are_written_otherwise_and_cut_alike_are_the_same(
    base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    def wrap(tree: dict[str, Any]) -> None:
        inner = tree["pre_tokenizer"]
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}

    folder = edited(grown(base, tmp_path / "a"), wrap)
    assert read_adapter(folder, spec).adapter.tokenizer is not None


def refused(kind: type[StoreError], folder: Path, spec: BaseSpec, *said: str) -> None:
    with pytest.raises(kind) as caught:
        read_adapter(folder, spec)
    assert type(caught.value) is kind
    assert caught.value.remedy
    for each in said:
        assert each in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tree: tree["model"].update(merges=[["a", "b"]]), "merges"),
        (lambda tree: tree["model"]["vocab"].pop("a"), "'a'"),
        (lambda tree: tree["model"]["vocab"].update(a=1, b=0), "the base's is"),
        (lambda tree: tree.update(pre_tokenizer=None), "other tokens for"),
        (lambda tree: tree["added_tokens"][-1].update(content="<|end|>"), "<|end|>"),
    ],
)
def test_a_tokenizer_that_differs_by_more_than_added_tokens_is_refused(
    edit: Callable[[dict[str, Any]], object],
    said: str,
    base: Path,
    spec: BaseSpec,
    tmp_path: Path,
) -> None:
    folder = edited(grown(base, tmp_path / "a"), edit)
    refused(BaseMismatchError, folder, spec, "tokenizer.json", said)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "\x00",
        '{"added_tokens": [3]}',
        '{"model": 3, "added_tokens": 5}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": [3]}}',
        '{"model": {"vocab": [["a", 1], ["b"]]}}',
        '{"model": {"vocab": {"a": [[]]}, "merges": [3]}}',
        '{"model": {"vocab": {"a": {}}}, "added_tokens": [{"content": [1]}]}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(
    content: str, base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    folder = grown(base, tmp_path / "a")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, spec)
    assert "tokenizer.json" in str(caught.value)


def test_tokens_without_rows_and_rows_without_tokens_are_refused(
    base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    folder = grown(base, tmp_path / "a", grow=False)
    grown_tokenizer().save_pretrained(folder)
    refused(InvalidAdapterError, folder, spec, "<tool>", "save_embedding_layers")
    folder = grown(base, tmp_path / "b")
    for file in folder.glob("*token*"):
        file.unlink()
    refused(InvalidAdapterError, folder, spec, "tokenizer.save_pretrained")


def test_a_token_that_pads_batches_needs_no_row(base: Path, spec: BaseSpec, tmp_path: Path) -> None:
    folder = grown(base, tmp_path / "a", grow=False)
    tokenizer = grown_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    edited(folder, lambda tree: tree.update(added_tokens=tree["added_tokens"][:2]))
    config = {"pad_token": ADDED[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_adapter(folder, spec).adapter.tokenizer is None


def test_merges_and_exports_of_added_tokens_are_refused_by_name(
    base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = read_adapter(grown(base, tmp_path / "a"), spec).adapter
    adapters: list[CanonicalAdapter] = [adapter, adapter]
    recipe = Recipe("ties", (("a" * 64, 0.5), ("b" * 64, 0.5)), density=0.5)
    with pytest.raises(UnsupportedFeatureError, match="adds tokens"):
        merge(recipe, adapters)
    with pytest.raises(UnsupportedFeatureError, match="adds tokens"):
        export_adapter(adapter, tmp_path / "out", "peft", spec)
