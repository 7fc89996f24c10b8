"""Pickles are read as tensors alone, within limits; anything else in one is never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_layouts import CONFIG, STEM, peft_config, peft_tensors, write_json

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.errors import StoreError
from quickchange_store.formats import pickled_weights
from quickchange_store.formats.pickled_weights import as_safetensors
from quickchange_store.importing import read_adapter


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def refused(path: Path) -> StoreError:
    with pytest.raises(StoreError) as caught, as_safetensors(path):
        pass
    assert caught.value.file == path.name
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", [f"{STEM}.bin", f"{STEM}.pt", "weights.pth"])
def test_code_in_a_pickle_is_not_run(bases: Any, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    folder = tmp_path / "adapter"
    write_json(folder / CONFIG, peft_config())
    (folder / name).write_bytes(pickle.dumps(_Evil(str(marker))))
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert caught.value.file == name
    assert "weights_only=True" in str(caught.value)
    assert not marker.exists()


def test_code_in_a_file_of_torch_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"a": torch.ones(2), "b": _Evil(str(marker))}, tmp_path / "a.bin")
    assert "weights_only=True" in str(refused(tmp_path / "a.bin"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(2), "step": 3},
        {"a": torch.ones(2), 7: torch.ones(2)},
        {"a": [torch.ones(2)]},
        {"a": torch.ones(2).to_sparse()},
        {"state_dict": {"a": torch.ones(2)}, "model": {"b": torch.ones(2)}},
        torch.ones(2),
        [torch.ones(2)],
        {},
        None,
        "text",
    ],
    ids=lambda content: repr(content)[:40],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.bin")
    refused(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "content", [b"\x80", b"PK\x03\x04", b"x" * 1000, b"\x80\x02}q\x00.", pickle.dumps([])]
)
def test_what_is_no_file_of_torch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin")


def test_an_empty_file_is_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    assert 'torch.load("a.bin", weights_only=True' in str(refused(tmp_path / "a.bin").remedy)


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    """One stored number, seen as many."""
    torch.save({"a": torch.ones(1).expand(1 << 22)}, tmp_path / "a.bin")
    assert "as large as the file" in str(refused(tmp_path / "a.bin"))


def test_a_compressed_bomb_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 24)}, stream)
    with (
        zipfile.ZipFile(stream) as plain,
        zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "a.bin").stat().st_size < 1 << 20
    refused(tmp_path / "a.bin")


def test_a_pickle_that_never_ends_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled_weights, "LIMIT_SECONDS", 0.01)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    assert "takes more than" in str(refused(tmp_path / "a.bin"))


def test_a_pipe_in_place_of_a_pickle_is_not_waited_for(bases: Any, tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG, peft_config())
    os.mkfifo(tmp_path / f"{STEM}.bin")
    with pytest.raises(StoreError) as caught:
        read_adapter(tmp_path, bases("llama").spec)
    assert caught.value.remedy


def test_shared_storage_and_parameters_are_plain_tensors(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    content = {"a": whole, "b": whole[2:4], "c": torch.nn.Parameter(torch.ones(2, 3).T)}
    torch.save(content, tmp_path / "a.bin")
    with as_safetensors(tmp_path / "a.bin") as path:
        read = load_file(path)
    assert not path.exists()
    assert {key: value.tolist() for key, value in read.items()} == {
        key: value.tolist() for key, value in content.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_pickles_dtypes_are_kept(bases: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    write_json(tmp_path / CONFIG, peft_config())
    tensors = {key: tensor.to(dtype) for key, tensor in peft_tensors().items()}
    torch.save(tensors, tmp_path / f"{STEM}.bin")
    updates = read_adapter(tmp_path, bases("llama").spec).adapter.updates
    assert {update.a.dtype for update in updates.values()} == {dtype}


def test_the_process_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment has paths alone."""
    seen: dict[str, str] = {}
    run = pickled_weights.subprocess.run

    def watched(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        return run(*arguments, env=env, **options)

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(pickled_weights.subprocess, "run", watched)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    with as_safetensors(tmp_path / "a.bin"):
        pass
    assert seen
    assert "secret" not in seen.values()


def test_safetensors_are_taken_before_a_pickle(bases: Any, tmp_path: Path) -> None:
    from trainer_layouts import write_peft

    write_peft(tmp_path)
    before = digest(read_adapter(tmp_path, bases("llama").spec).adapter)
    (tmp_path / f"{STEM}.bin").write_bytes(b"\x80")
    shutil.copy(tmp_path / f"{STEM}.bin", tmp_path / f"{STEM}.pt")
    assert digest(read_adapter(tmp_path, bases("llama").spec).adapter) == before
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4
