"""`quickchange adapters check`: what a folder is, with no store and, where need be, no base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from trainer_layouts import (
    CONFIG,
    REFUSED,
    STEM,
    WEIGHTS,
    Tensors,
    peft_config,
    peft_tensors,
    pickled,
    write_json,
    write_mlx,
    write_peft,
    write_several,
    write_torchtune,
)
from typer.testing import CliRunner, Result

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.checking.trainer_signs import trainer_of
from quickchange_store.cli import app
from quickchange_store.importing import read_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    return made


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def report(*arguments: object) -> dict[str, Any]:
    result = check(*arguments, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (found["refused"] is not None)
    return found


def test_a_folder_is_reported_as_it_would_be_served(folder: Path, bases: Any) -> None:
    write_peft(folder)
    base = bases("llama")
    found = report(folder, "--base", base.folder)
    adapter = read_adapter(folder, base.spec).adapter
    assert found["trainer"] == "PEFT"
    assert found["checked_against"] == str(base.folder)
    assert found["not_checked"] == []
    assert found["served"] | {"bytes": 0} == {
        "kind": "LoRA",
        "layout": "peft",
        "modules": 14,
        "targets": sorted(peft_config()["target_modules"]),
        "ranks": [4],
        "parameters": adapter.parameters,
        "dtypes": ["float32"],
        "bytes": 0,
        "invocation": [],
        "digest": digest(adapter),
    }
    assert found["served"]["bytes"] > 4 * adapter.parameters


def test_the_base_that_the_adapter_names_is_taken_if_it_is_a_folder(
    folder: Path, bases: Any
) -> None:
    write_peft(folder, base_model_name_or_path=str(bases("llama").folder))
    found = report(folder)
    assert found["checked_against"] == str(bases("llama").folder)
    assert found["served"]["digest"]


def test_another_base_is_refused(folder: Path, bases: Any) -> None:
    write_peft(folder)
    found = report(folder, "--base", bases("gpt_neox").folder)
    assert found["served"] is None
    assert found["refused"]["key"] == "target_modules"
    assert found["refused"]["remedy"]


@pytest.mark.parametrize("name", ["nobody/absent", "/no/such/folder", "a b c", "", None])
def test_without_its_base_a_lora_is_held_against_itself(folder: Path, name: str | None) -> None:
    write_peft(folder, base_model_name_or_path=name)
    found = report(folder)
    assert found["checked_against"] is None
    assert found["served"]["modules"] == 14
    assert found["served"]["digest"] is None
    assert "--base" in found["not_checked"][0]


def test_without_its_base_a_field_that_is_not_served_is_found(folder: Path) -> None:
    write_peft(folder, layer_replication=[[0, 2]])
    assert report(folder)["refused"]["key"] == "layer_replication"


def test_without_its_base_a_missing_tensor_is_found(folder: Path) -> None:
    write_peft(folder)
    tensors: Tensors = load_file(folder / WEIGHTS)
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / WEIGHTS)
    assert report(folder)["refused"]["key"] == gone


@pytest.mark.parametrize("write", [write_torchtune, write_mlx])
def test_another_layout_without_its_base_says_what_was_not_checked(
    folder: Path, write: Any
) -> None:
    write(folder)
    found = report(folder)
    assert found["served"] is found["refused"] is None
    assert "--base" in found["not_checked"][0]
    assert ("torchtune" in str(found["not_checked"])) == (write is write_torchtune)


def test_a_folder_of_checkpoints_names_the_one_to_give(folder: Path) -> None:
    write_several(folder)
    result = check(folder)
    assert result.exit_code == 1
    assert f"give one of them, such as {folder / 'checkpoint-1000'}" in result.stdout
    assert report(folder / "checkpoint-1000")["served"]


@pytest.mark.parametrize("layout", REFUSED, ids=lambda each: each.writes)
def test_what_is_refused_has_the_remedy_on_a_line_of_its_own(
    folder: Path, bases: Any, layout: Any
) -> None:
    layout.write(folder)
    result = check(folder, "--base", bases("llama").folder)
    assert result.exit_code == 1
    [line] = [line for line in result.stdout.splitlines() if line.startswith("to mend it: ")]
    assert layout.refused in line


def test_a_base_that_can_not_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_peft(folder)
    result = check(folder, "--base", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    found = report(tmp_path / "absent")
    assert "no such folder" in found["refused"]["problem"]


def test_checking_leaves_the_folder_as_it_is(folder: Path, bases: Any) -> None:
    pickled(f"{STEM}.bin")(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    report(folder, "--base", bases("llama").folder)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("file", "content", "trainer"),
    [
        ("README.md", "---\ntags:\n- trl\n- unsloth\n---\n", "Unsloth"),
        ("README.md", "---\ntags:\n- axolotl\n- trl\n---\n", "Axolotl"),
        ("README.md", "---\ntags:\n- llama-factory\n---\n", "LLaMA-Factory"),
        ("README.md", "---\ntags:\n- trl\n---\n- unsloth", "TRL"),
        ("README.md", "- unsloth", "PEFT"),
        ("additional_config.json", "{}", "ms-swift"),
        ("lora_train_meta.json", "{}", "verl"),
        ("adapter_0.pt", "", "torchtune"),
        ("trainer_state.json", "{}", "transformers' Trainer"),
    ],
)
def test_the_trainer_is_told_by_what_it_leaves(
    folder: Path, file: str, content: str, trainer: str
) -> None:
    write_json(folder / CONFIG, peft_config())
    (folder / file).write_text(content)
    save_file(peft_tensors(), folder / WEIGHTS)
    assert trainer_of(folder, peft_config()) == trainer
