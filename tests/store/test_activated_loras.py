"""PEFT's aLoRA in the store: read with its invocation, told, written back, merged with its like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quickchange_store import index
from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.stored_parts import Invocation
from quickchange_store.cli import app
from quickchange_store.combining.merging import Recipe, merge
from quickchange_store.errors import InvalidAdapterError, StoreError, UnsupportedFeatureError
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

CONFIG = "adapter_config.json"
FIELD = "alora_invocation_tokens"
TOKENS = [5, 6, 5]


@pytest.fixture(scope="module")
def folder(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activated")
    train(
        "llama", folder, r=4, target_modules=["q_proj", "up_proj"], alora_invocation_tokens=TOKENS
    )
    return folder


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps({**config, **changes}))
    return to


def made(value: float, tokens: tuple[int, ...] | None = (5, 6)) -> CanonicalAdapter:
    update = LowRankUpdate(torch.ones(2, 4) * value, torch.ones(4, 2), 1.0)
    invocation = None if tokens is None else Invocation(tokens)
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {"m": update}, invocation=invocation)


def test_peft_alora_is_a_lora_with_an_invocation_which_is_part_of_its_digest(
    folder: Path, bases: Any, tmp_path: Path
) -> None:
    base = bases("llama").spec
    read = read_adapter(folder, base).adapter
    assert read.invocation == Invocation(tuple(TOKENS))
    plain = read_adapter(edited(folder, tmp_path / "plain", **{FIELD: None}), base).adapter
    assert plain.invocation is None
    assert digest(plain) == digest(replace(read, invocation=None)) != digest(read)


def test_the_store_tells_the_invocation_and_keeps_it(
    folder: Path, bases: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    version = add_adapter(store, "judge", folder, bases("llama").spec).version
    assert version.invoked
    assert Store(tmp_path / "store").snapshot().entries["judge"].versions[1].invoked
    info = store.info(version.digest)
    assert (info.kind, info.invocation) == ("aLoRA", tuple(TOKENS))
    assert store.load(version.digest).invocation == Invocation(tuple(TOKENS))
    arguments = ["show", "judge", "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(app, arguments)
    assert "5, 6, 5" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert told["invocation"] == TOKENS


def test_an_index_with_an_alora_is_refused_by_readers_that_would_drop_its_invocation(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    store.add("plain", made(1.0, None))
    assert json.loads(index.encode(store.snapshot()))["format"] == index.FORMAT
    store.add("judge", made(1.0))
    assert json.loads(index.encode(store.snapshot()))["format"] == index.LATER_FORMAT


def test_the_check_of_a_folder_tells_what_activates_it(folder: Path, bases: Any) -> None:
    run = CliRunner().invoke(app, ["check", str(folder), "--base", str(bases("llama").folder)])
    assert run.exit_code == 0, run.output
    assert "served: aLoRA" in run.stdout
    assert "tokens 5, 6, 5, where they stand last" in run.stdout


@pytest.mark.parametrize("layout", [ExportLayout.PEFT, ExportLayout.TURBO])
def test_written_and_read_back_it_is_the_same_version(
    layout: ExportLayout, folder: Path, bases: Any, tmp_path: Path
) -> None:
    base = bases("llama").spec
    read = read_adapter(folder, base).adapter
    export_adapter(read, tmp_path / "out", layout, base)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())[FIELD] == TOKENS
    assert digest(read_adapter(tmp_path / "out", base).adapter) == digest(read)


def test_no_layout_is_written_whose_reader_would_serve_the_whole_text(
    folder: Path, bases: Any, tmp_path: Path
) -> None:
    base = bases("llama").spec
    with pytest.raises(UnsupportedFeatureError, match="--format peft"):
        export_adapter(read_adapter(folder, base).adapter, tmp_path / "x", ExportLayout.LORAX, base)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_dora": True}, "use_dora"),
        ({FIELD: "abc"}, FIELD),
        ({FIELD: [1, -2]}, FIELD),
        ({FIELD: [1, True]}, FIELD),
        ({FIELD: [1.5]}, FIELD),
        ({FIELD: [1] * 5000}, FIELD),
    ],
)
def test_what_cannot_begin_at_an_invocation_is_refused_by_its_field(
    changes: dict[str, Any], key: str, folder: Path, bases: Any, tmp_path: Path
) -> None:
    with pytest.raises(StoreError) as caught:
        read_adapter(edited(folder, tmp_path / "wrong", **changes), bases("llama").spec)
    assert isinstance(caught.value, InvalidAdapterError | UnsupportedFeatureError)
    assert (caught.value.file, caught.value.key) == (CONFIG, key)
    assert caught.value.remedy


def test_an_embedding_is_not_activated(train: Any, bases: Any, tmp_path: Path) -> None:
    train("llama", tmp_path / "embedding", r=4, target_modules=["embed_tokens"])
    wrong = edited(tmp_path / "embedding", tmp_path / "wrong", **{FIELD: TOKENS})
    with pytest.raises(UnsupportedFeatureError, match="linear modules alone"):
        read_adapter(wrong, bases("llama").spec)


def test_aloras_of_one_invocation_merge_into_one_that_has_it() -> None:
    recipe = Recipe("ties", (("a", 1.0), ("b", 1.0)), density=0.5)
    assert merge(recipe, [made(1.0), made(2.0)]).invocation == Invocation((5, 6))


@pytest.mark.parametrize("other", [(5, 7), None])
def test_adapters_of_different_invocations_are_not_merged(other: tuple[int, ...] | None) -> None:
    recipe = Recipe("ties", (("a", 1.0), ("b", 1.0)), density=0.5)
    for adapters in ([made(1.0), made(2.0, other)], [made(1.0, other), made(2.0)]):
        with pytest.raises(UnsupportedFeatureError, match="other tokens"):
            merge(recipe, adapters)
