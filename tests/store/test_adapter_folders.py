"""Which folder and which files of a trainer's output are the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_layouts import CONFIG, STEM, WEIGHTS, sharded, within, write_json, write_peft

from quickchange_store.errors import InvalidAdapterError
from quickchange_store.formats.layouts.adapter_folder import MAX_DEPTH, adapter_folder
from quickchange_store.formats.weight_files import weight_files
from quickchange_store.importing import read_adapter

INDEX = f"{WEIGHTS}.index.json"


@pytest.mark.parametrize("inside", ["a", "a/b", "global_step_10/actor/lora_adapter", "1/2/3/4"])
def test_the_only_adapter_inside_is_meant(tmp_path: Path, inside: str) -> None:
    within(inside, write_peft)(tmp_path)
    assert adapter_folder(tmp_path) == tmp_path / inside


def test_an_adapter_of_its_own_goes_before_those_inside(tmp_path: Path) -> None:
    write_peft(tmp_path)
    within("checkpoint-5", write_peft)(tmp_path)
    assert adapter_folder(tmp_path) == tmp_path


def test_a_configuration_of_the_base_alone_is_no_adapter(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    within("checkpoint-5", write_peft)(tmp_path)
    assert adapter_folder(tmp_path) == tmp_path / "checkpoint-5"


def test_an_adapter_within_an_adapters_folder_is_not_counted_again(tmp_path: Path) -> None:
    within("mine", write_peft)(tmp_path)
    within("mine/checkpoint-5", write_peft)(tmp_path)
    assert adapter_folder(tmp_path) == tmp_path / "mine"


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    within("elsewhere", write_peft)(tmp_path)
    given_folder = tmp_path / "given"
    given_folder.mkdir()
    (given_folder / "link").symlink_to(tmp_path / "elsewhere")
    (given_folder / "loop").symlink_to(given_folder)
    assert adapter_folder(given_folder) == given_folder


def test_links_to_files_are_read_as_the_hubs_cache_has_them(tmp_path: Path, bases: Any) -> None:
    within("blobs", write_peft)(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    assert read_adapter(snapshot, bases("llama").spec).adapter.updates


def test_folders_are_looked_for_to_a_depth(tmp_path: Path) -> None:
    within("/".join("x" * (MAX_DEPTH + 1)), write_peft)(tmp_path)
    assert adapter_folder(tmp_path) == tmp_path


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.integers(0, 10**7), min_size=2, max_size=5, unique=True))
def test_the_latest_of_several_checkpoints_is_named(tmp_path: Path, steps: list[int]) -> None:
    folder = tmp_path / "out"
    for step in steps:
        write_json(folder / f"checkpoint-{step}" / CONFIG, {})
    try:
        with pytest.raises(InvalidAdapterError) as caught:
            adapter_folder(folder)
    finally:
        shutil.rmtree(folder)
    assert str(caught.value.remedy).endswith(f"checkpoint-{max(steps)}")


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "absent.safetensors",
        7,
        None,
    ],
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, listed: Any) -> None:
    folder = tmp_path / "adapter"
    write_peft(folder)
    (folder / WEIGHTS).rename(tmp_path / "other.safetensors")
    write_json(folder / INDEX, {"weight_map": {"a": listed}})
    with pytest.raises(InvalidAdapterError) as caught:
        weight_files(folder, WEIGHTS, "PEFT")
    assert (caught.value.file, caught.value.key) == (INDEX, "weight_map")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_what_is_no_index_is_refused(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / INDEX, content)
    with pytest.raises(InvalidAdapterError, match="not an index"):
        weight_files(tmp_path, WEIGHTS, "PEFT")


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_missing_shard_is_named(tmp_path: Path, bases: Any, gone: int) -> None:
    sharded(index=False)(tmp_path)
    name = f"{STEM}-{gone:05}-of-00003.safetensors"
    (tmp_path / name).unlink()
    with pytest.raises(InvalidAdapterError) as caught:
        read_adapter(tmp_path, bases("llama").spec)
    assert caught.value.file == name


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, bases: Any) -> None:
    sharded(index=True)(tmp_path)
    shutil.copy(
        tmp_path / f"{STEM}-00001-of-00003.safetensors",
        tmp_path / f"{STEM}-00002-of-00003.safetensors",
    )
    with pytest.raises(InvalidAdapterError, match="too"):
        read_adapter(tmp_path, bases("llama").spec)


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors"), ("a.bin", "b.pt")])
def test_which_of_several_files_is_meant_is_not_guessed(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InvalidAdapterError) as caught:
        weight_files(tmp_path, WEIGHTS, "PEFT")
    assert ", ".join(sorted(names)[: len(names)]) in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "recipe_state.pt",
        "random_states_0.pkl",
        "value_head.bin",
        "v_head.safetensors",
        "medusa_lm_head.safetensors",
        "0000100_adapters.safetensors",
    ],
)
def test_the_trainings_state_is_no_weights(tmp_path: Path, state: str) -> None:
    (tmp_path / state).touch()
    with pytest.raises(InvalidAdapterError, match="missing"):
        weight_files(tmp_path, WEIGHTS, "PEFT")
    (tmp_path / "mine.pt").touch()
    assert weight_files(tmp_path, WEIGHTS, "PEFT") == [tmp_path / "mine.pt"]
