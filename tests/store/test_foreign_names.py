"""Adapters under the names of wrappers and of other tools: the same adapter, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.errors import InvalidAdapterError, StoreError, UnsupportedFeatureError
from quickchange_store.formats.peft.tensor_names import WRAPPERS, TensorNames
from quickchange_store.importing import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    train("llama", folder, r=4, target_modules=["q_proj"], alpha_pattern={Q0: 3})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def rename(folder: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".my_adapter.weight"),
    "DDP": lambda key: f"module.{key}",
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the inner model alone": lambda key: key.removeprefix(f"{PREFIX}model."),
    "the prefix twice": lambda key: PREFIX + key,
    "compiled before": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled after": lambda key: f"_orig_mod.{key}",
    "compiled modules": lambda key: key.replace(".q_proj", ".q_proj._orig_mod"),
    "FSDP": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpoints": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "a multimodal model": lambda key: key.replace(
        f"{PREFIX}model", f"{PREFIX}language_model.model"
    ),
    "a newer multimodal model": lambda key: key.replace(
        f"{PREFIX}model.", f"{PREFIX}model.language_model."
    ),
    "several at once": lambda key: (
        "module._orig_mod."
        + key.replace(".q_proj", "._fsdp_wrapped_module.q_proj").replace(
            ".weight", ".default.weight"
        )
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_another_spelling_is_the_same_adapter(
    saved: Path, folder: Path, bases: Any, spelling: Callable[[str], str]
) -> None:
    base = bases("llama").spec
    rename(folder, spelling)
    assert digest(read_adapter(folder, base).adapter) == digest(read_adapter(saved, base).adapter)


def test_patterns_are_matched_with_the_names_of_the_training(
    saved: Path, folder: Path, bases: Any
) -> None:
    base = bases("llama").spec
    rename(folder, SPELLINGS["a newer multimodal model"])
    edit(
        folder,
        target_modules=r"model\.language_model\..*\.q_proj",
        alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 3},
    )
    assert digest(read_adapter(folder, base).adapter) == digest(read_adapter(saved, base).adapter)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(sorted(WRAPPERS)))), st.booleans())
def test_wrappers_anywhere_leave_the_name(
    bases: Any, wrappers: list[tuple[int, str]], prefixed: bool
) -> None:
    plain = f"{PREFIX}{Q0}.lora_A.weight"
    parts = (plain if prefixed else plain.removeprefix(PREFIX)).split(".")
    for place, wrapper in wrappers:
        parts.insert(min(place, len(parts) - 1), wrapper)
    assert TensorNames(bases("llama").spec).plain(".".join(parts)) == plain


@pytest.mark.parametrize(
    "key",
    [
        "vision_tower.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.vision_tower.model.layers.0.self_attn.q_proj.lora_A.weight",
        "layers.9.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "q_proj.lora_A.weight",
    ],
)
def test_what_is_no_module_of_the_base_gets_no_name(bases: Any, key: str) -> None:
    assert TensorNames(bases("llama").spec).plain(key) is None


def refused(folder: Path, base: Any, kind: type[StoreError]) -> StoreError:
    with pytest.raises(kind) as caught:
        read_adapter(folder, base)
    return caught.value


def test_a_strange_name_is_told_with_the_one_that_is_sought(folder: Path, bases: Any) -> None:
    rename(folder, lambda key: key.replace("lora_A", "lora_C"))
    error = refused(folder, bases("llama").spec, InvalidAdapterError)
    assert error.key == f"{PREFIX}{Q0}.lora_A.weight"
    assert f"there is {PREFIX}{Q0}.lora_C.weight instead" in str(error)


def test_two_adapters_in_one_file_are_refused_with_both_names(folder: Path, bases: Any) -> None:
    rename(folder, lambda key: key.replace(".weight", f".{'ab'['.1.' in key]}.weight"))
    error = refused(folder, bases("llama").spec, InvalidAdapterError)
    assert "'a'" in str(error)
    assert "'b'" in str(error)


def test_two_names_of_one_tensor_are_refused_with_both(folder: Path, bases: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = f"{PREFIX}{Q0}.lora_A.weight"
    save_file({**tensors, f"module.{key}": tensors[key] + 1}, folder / WEIGHTS)
    error = refused(folder, bases("llama").spec, InvalidAdapterError)
    assert str(error).count(f"module.{key}") == 1
    assert str(error).count(key) == 2  # as it is, and in the other


@pytest.mark.parametrize(
    ("field", "value"),
    [("lorap_emb_lr", 1e-6), ("lorap_lr_ratio", None), ("lora_dtype", "float32")],
)
def test_what_tells_of_the_training_alone_is_accepted(
    folder: Path, bases: Any, field: str, value: object
) -> None:
    edit(folder, **{field: value, "some_new_field": None, "another": []})
    assert read_adapter(folder, bases("llama").spec).adapter.updates


def test_a_new_field_that_is_set_is_refused_by_name(folder: Path, bases: Any) -> None:
    edit(folder, some_new_field=0.5)
    error = refused(folder, bases("llama").spec, UnsupportedFeatureError)
    assert error.key == "some_new_field"


# --- MLX ----------------------------------------------------------------------------------------


def as_mlx(saved: Path, folder: Path, scale: float, **config: Any) -> Path:
    """The PEFT adapter in `saved` as MLX LM would have written it."""
    folder.mkdir()
    tensors = {
        key.removeprefix(PREFIX)
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b")
        .replace("lora_magnitude_vector", "m"): tensor.T.contiguous()
        if tensor.ndim == 2
        else tensor
        for key, tensor in load_file(saved / WEIGHTS).items()
    }
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
    written = {"fine_tune_type": "lora", "lora_parameters": parameters, "config": None, **config}
    (folder / CONFIG).write_text(json.dumps({"model": "x", "iters": 100, "seed": 0, **written}))
    return folder


@pytest.mark.parametrize("dora", [False, True])
def test_an_mlx_folder_is_pefts_with_alpha_scale_times_rank(
    train: Any, bases: Any, tmp_path: Path, dora: bool
) -> None:
    base = bases("llama").spec
    peft = tmp_path / "peft"
    train("llama", peft, r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], use_dora=dora)
    mlx = as_mlx(peft, tmp_path / "mlx", 2.5, fine_tune_type="dora" if dora else "lora")
    ours, theirs = (read_adapter(folder, base).adapter for folder in (mlx, peft))
    assert ours.updates.keys() == theirs.updates.keys()
    for module, update in theirs.updates.items():
        for name, tensor in update.tensors.items():
            torch.testing.assert_close(ours.updates[module].tensors[name], tensor)
        assert ours.updates[module].scale == update.scale
    assert ours.source["format"] == "mlx"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type"),
        ({"lora_parameters": None}, "lora_parameters"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "lora_parameters.rank"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "alpha": 8}}, "lora_parameters.alpha"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "alpha": 4, "a": 1}}, "lora_parameters.a"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "new": 8}}, "lora_parameters.new"),
    ],
)
def test_an_mlx_folder_that_can_not_be_served_is_refused_by_its_field(
    saved: Path, bases: Any, tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    folder = as_mlx(saved, tmp_path / "mlx", 2.0, **config)
    assert refused(folder, bases("llama").spec, StoreError).key == key
