"""Quickchange's own directory of Turbo heads: written, read, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.turbo.medusa_write import check_lorax, check_vllm
from quickchange_store.formats.turbo.turbo_directory import write_turbo_directory
from quickchange_store.importing import read_adapter

H, V = 32, 53  # of the base models in conftest
CONFIG, WEIGHTS, KEY = "config.json", "turbo_heads.safetensors", "quickchange_turbo"


def block(seed: int, width: int = H) -> DraftBlock:
    generator = torch.Generator().manual_seed(seed)
    return DraftBlock(
        torch.randn(H, width, generator=generator), torch.randn(H, generator=generator)
    )


def recurrent() -> TurboHeads:
    """Four sequential heads of the same two blocks, over a draft vocabulary."""
    return TurboHeads(
        (block(0, 2 * H), block(1)),
        ((0, 1),) * 4,
        sequential=True,
        vocabulary=torch.tensor([2, 7, 50], dtype=torch.int32),
    )


def uneven() -> TurboHeads:
    """Parallel heads of different lengths with LM heads of their own."""
    outputs = tuple(torch.randn(V, H, generator=torch.Generator().manual_seed(i)) for i in range(2))
    return TurboHeads((block(0), block(1)), ((0,), (0, 1)), outputs=outputs)


@pytest.fixture(scope="module")
def spec(bases: Any) -> BaseSpec:
    made: BaseSpec = bases("llama").spec
    return made


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[KEY].update(fields)
    (folder / CONFIG).write_text(json.dumps(config))


def refused(
    kind: type[StoreError], folder: Path, base: BaseSpec, file: str, key: str | None
) -> None:
    with pytest.raises(kind) as raised:
        read_adapter(folder, base)
    error = raised.value
    assert (type(error), error.file, error.key) == (kind, file, key)
    assert error.remedy


@pytest.mark.parametrize("heads", [recurrent(), uneven()], ids=["recurrent", "uneven"])
def test_what_is_written_is_read_back(heads: TurboHeads, tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(heads, tmp_path / "made", "tiny", {"recipe": {"seed": 3}})
    read = read_adapter(tmp_path / "made", spec)
    assert read.warnings == ()
    assert read.adapter.base_name == "tiny"
    assert read.adapter.source == {"format": "turbo", "notes": {"recipe": {"seed": 3}}}
    expected = CanonicalAdapter(spec.architecture, "", {}, {}, heads)
    assert adapter_bytes.digest(read.adapter) == adapter_bytes.digest(expected)


def test_equal_blocks_are_written_once(tmp_path: Path, spec: BaseSpec) -> None:
    twice = TurboHeads((block(0), block(0), block(5)), ((0,), (1,)))
    write_turbo_directory(twice, tmp_path, "tiny")
    assert set(load_file(tmp_path / WEIGHTS)) == {"block.0.weight", "block.0.bias"}
    turbo = read_adapter(tmp_path, spec).adapter.turbo
    assert turbo is not None
    assert turbo.heads == ((0,), (0,))


def test_heads_and_a_lora_in_one_folder_are_a_turbo_lora(
    train: Any, tmp_path: Path, spec: BaseSpec
) -> None:
    train("llama", tmp_path, r=4, target_modules=["q_proj"])
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    adapter = read_adapter(tmp_path, spec).adapter
    assert (len(adapter.updates), adapter.turbo is not None) == (2, True)


def test_notes_that_json_can_not_say_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_turbo_directory(recurrent(), tmp_path / "made", "tiny", {"what": object()})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"heads": []},
        {"heads": [[]]},
        {"heads": [[-1]]},
        {"heads": "01"},
        {"heads": None},
        {"outputs": [0]},
        {"outputs": None},
    ],
)
def test_a_description_that_is_none_is_refused(
    fields: dict[str, Any], tmp_path: Path, spec: BaseSpec
) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    edit_config(tmp_path, **fields)
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, KEY)


def test_a_block_in_the_wrong_place_is_refused(tmp_path: Path, spec: BaseSpec) -> None:
    heads = TurboHeads((block(0, 2 * H),), ((0,),), sequential=True)
    write_turbo_directory(heads, tmp_path, "tiny")
    edit_config(tmp_path, heads=[[0, 0]])
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, KEY)


def test_a_later_format_is_refused(tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    edit_config(tmp_path, format=3)
    refused(UnsupportedFeatureError, tmp_path, spec, CONFIG, f"{KEY}.format")


@pytest.mark.parametrize(
    ("key", "change", "kind"),
    [
        ("block.1.bias", None, InvalidAdapterError),
        ("block.0.weight", torch.zeros(H, H), BaseMismatchError),  # sequential: [H, 2 H]
        ("block.1.weight", torch.zeros(H, 2 * H), BaseMismatchError),
        ("block.1.bias", torch.full((H,), float("nan")), InvalidAdapterError),
        ("vocabulary", torch.tensor([2, 2]), InvalidAdapterError),
        ("vocabulary", torch.tensor([2, V]), InvalidAdapterError),
        ("vocabulary", torch.zeros(0, dtype=torch.int32), InvalidAdapterError),
        ("vocabulary", torch.tensor(3), InvalidAdapterError),
        ("block.2.weight", torch.zeros(H, H), InvalidAdapterError),
        ("output.0", torch.zeros(V, H), InvalidAdapterError),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    key: str,
    change: torch.Tensor | None,
    kind: type[StoreError],
    tmp_path: Path,
    spec: BaseSpec,
) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    tensors = load_file(tmp_path / WEIGHTS)
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change
    save_file(tensors, tmp_path / WEIGHTS)
    refused(kind, tmp_path, spec, WEIGHTS, key)


def test_own_lm_heads_have_a_row_for_each_drafted_token(tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(uneven(), tmp_path, "tiny")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "output.1": torch.zeros(V - 1, H)}, tmp_path / WEIGHTS)
    refused(BaseMismatchError, tmp_path, spec, WEIGHTS, "output.1")


def test_missing_weights_are_named(tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    (tmp_path / WEIGHTS).unlink()
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, None)


def test_weights_without_their_description_are_refused(tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    (tmp_path / CONFIG).write_text(json.dumps({"medusa_num_heads": 4}))
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, None)


def test_heads_in_two_layouts_are_refused(tmp_path: Path, spec: BaseSpec) -> None:
    write_turbo_directory(recurrent(), tmp_path, "tiny")
    save_file({"0.0.linear.bias": torch.zeros(H)}, tmp_path / "medusa_lm_head.safetensors")
    refused(InvalidAdapterError, tmp_path, spec, "medusa_lm_head.safetensors", None)


def test_heads_of_one_tenant_are_so_again_and_known_to_no_earlier_reader(
    tmp_path: Path, spec: BaseSpec
) -> None:
    heads = replace(recurrent(), tenant="acme")
    write_turbo_directory(heads, tmp_path, "tiny")
    assert json.loads((tmp_path / CONFIG).read_text())[KEY]["format"] == 2
    read = read_adapter(tmp_path, spec).adapter.turbo
    assert read is not None
    assert read.tenant == "acme"
    edit_config(tmp_path, tenant=7)
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, KEY)


@pytest.mark.parametrize("check", [check_lorax, check_vllm])
def test_medusas_layouts_cant_say_whom_heads_draft_for(
    spec: BaseSpec, check: Callable[[TurboHeads, BaseSpec], None]
) -> None:
    heads = TurboHeads((block(0), block(1)), ((0,), (1,)), tenant="acme")
    with pytest.raises(UnsupportedFeatureError, match="the tenant acme alone"):
        check(heads, spec)
