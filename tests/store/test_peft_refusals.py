"""What can't be served exactly is refused, and the message names file, key and remedy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.peft.lora import read_peft
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def saved(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter: rank 4 on q_proj of both layers."""
    folder = tmp_path_factory.mktemp("saved")
    train("llama", folder, r=4, target_modules=["q_proj"])
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(
    kind: type[StoreError], folder: Path, base: Any, file: str, key: str | None
) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base)
    error = caught.value
    assert type(error) is kind
    assert error.file == file
    assert error.key == key
    assert error.remedy
    assert error.remedy in str(error)
    assert file in str(error)
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("arrow_config", {"top_k": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("a_field_of_the_future", 3),
        ("peft_type", "XLORA"),
        ("peft_type", "OFT"),
        ("peft_type", "LATER"),
    ],
)
def test_an_unsupported_field_is_named(field: str, value: Any, folder: Path, bases: Any) -> None:
    edit_config(folder, **{field: value})
    refused(UnsupportedFeatureError, folder, bases("llama").spec, CONFIG, field)


@pytest.mark.parametrize("value", [None, False, [], {}, 0])
def test_a_field_that_asks_for_nothing_is_accepted(value: Any, folder: Path, bases: Any) -> None:
    edit_config(folder, a_field_of_the_future=value, modules_to_save=value)
    assert read_adapter(folder, bases("llama").spec).adapter.updates


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("r", 0, "r"),
        ("r", "8", "r"),
        ("r", True, "r"),
        ("lora_alpha", float("nan"), "lora_alpha"),
        ("lora_alpha", None, "lora_alpha"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern.q_proj"),
        ("rank_pattern", {"q_proj(": 4}, "rank_pattern.q_proj("),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern.q_proj"),
        ("alpha_pattern", [1], "alpha_pattern"),
        ("bias", "some", "bias"),
        ("use_rslora", "yes", "use_rslora"),
        ("target_modules", 5, "target_modules"),
        ("peft_type", None, "peft_type"),
    ],
)
def test_an_invalid_value_is_named(
    field: str, value: Any, key: str, folder: Path, bases: Any
) -> None:
    edit_config(folder, **{field: value})
    refused(InvalidAdapterError, folder, bases("llama").spec, CONFIG, key)


def test_a_broken_regular_expression_is_named(folder: Path, bases: Any) -> None:
    edit_config(folder, target_modules="(q_proj")
    with pytest.raises(InvalidAdapterError, match="target_modules"):
        read_adapter(folder, bases("llama").spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"([a-z0-9._]+)+X"},
        {"exclude_modules": r"(\w+|\.)*X"},
        {"rank_pattern": {r"(([a-z0-9._])+)+X": 4}},
        {"alpha_pattern": {r"(.+)+(.+)+X": 4}},
    ],
)
def test_an_expression_that_never_ends_is_refused_in_time(
    changes: dict[str, Any], folder: Path, bases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quickchange_store.formats.patterns.LIMIT_SECONDS", 0.5)
    edit_config(folder, **changes)
    with pytest.raises(InvalidAdapterError, match="regular expression takes more"):
        read_adapter(folder, bases("llama").spec)


def test_targets_that_the_base_lacks_are_another_base(folder: Path, bases: Any) -> None:
    edit_config(folder, target_modules=["c_attn"])
    error = refused(BaseMismatchError, folder, bases("llama").spec, CONFIG, "target_modules")
    assert "c_attn" in str(error)


def test_another_architecture_is_named(folder: Path, bases: Any) -> None:
    edit_config(folder, auto_mapping={"base_model_class": "MistralForCausalLM"})
    error = refused(
        BaseMismatchError,
        folder,
        bases("llama").spec,
        CONFIG,
        "auto_mapping.base_model_class",
    )
    assert "MistralForCausalLM" in str(error)
    assert "LlamaForCausalLM" in str(error)


def test_an_adapter_of_another_family_is_refused(folder: Path, bases: Any) -> None:
    refused(BaseMismatchError, folder, bases("gpt_neox").spec, CONFIG, "target_modules")


def test_weights_of_conv1d_are_refused_as_parameters(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    """Square ones too: their A and B belong to the other sides."""
    train("gpt2", tmp_path, target_modules=[], target_parameters=["attn.c_proj.weight"])
    error = refused(
        UnsupportedFeatureError, tmp_path, bases("gpt2").spec, CONFIG, "target_parameters"
    )
    assert "linear" in str(error)


def test_missing_weights_are_named(folder: Path, bases: Any) -> None:
    (folder / WEIGHTS).unlink()
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, None)


def test_a_missing_configuration_is_named(folder: Path, bases: Any) -> None:
    (folder / CONFIG).unlink()
    refused(InvalidAdapterError, folder, bases("llama").spec, CONFIG, None)


@pytest.mark.parametrize("content", ["", "[]", "{", '"LORA"', "[" * 100_000])
def test_a_damaged_configuration_is_named(content: str, folder: Path, bases: Any) -> None:
    (folder / CONFIG).write_text(content)
    refused(InvalidAdapterError, folder, bases("llama").spec, CONFIG, None)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_damaged_weights_are_named(cut: int, folder: Path, bases: Any) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:cut])
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, None)


@pytest.mark.parametrize("key", [Q0_A, Q0_B])
def test_a_missing_tensor_is_named(key: str, folder: Path, bases: Any) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, key)


def test_a_tensor_of_a_module_that_is_not_targeted_is_named(folder: Path, bases: Any) -> None:
    key = Q0_A.replace("q_proj", "k_proj")
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    error = refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, key)
    assert "k_proj" in str(error)


def test_a_tensor_of_a_module_that_the_base_lacks_is_another_base(folder: Path, bases: Any) -> None:
    key = Q0_A.replace("layers.0", "layers.7")
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    error = refused(BaseMismatchError, folder, bases("llama").spec, WEIGHTS, key)
    assert "model.layers.7.self_attn.q_proj" in str(error)


def test_a_tensor_that_nothing_explains_is_named(folder: Path, bases: Any) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"stray": torch.zeros(2)}))
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, "stray")


def test_a_dora_vector_that_the_configuration_denies_is_named(folder: Path, bases: Any) -> None:
    key = Q0_A.replace("lora_A.weight", "lora_magnitude_vector")
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(32)}))
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, key)


def test_a_missing_dora_vector_is_named(folder: Path, bases: Any) -> None:
    edit_config(folder, use_dora=True)
    key = Q0_A.replace("lora_A.weight", "lora_magnitude_vector")
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, key)


def test_dora_needs_the_weights_of_the_base(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    spec = dataclasses.replace(bases("llama").spec, weights=None)
    key = Q0_A.replace("lora_A.weight", "lora_magnitude_vector")
    error = refused(BaseModelError, tmp_path, spec, WEIGHTS, key)
    assert "model.layers.0.self_attn.q_proj.weight" in str(error)


def test_dora_with_a_bias_of_its_own_is_refused(folder: Path, bases: Any) -> None:
    edit_config(folder, use_dora=True, lora_bias=True)
    refused(InvalidAdapterError, folder, bases("llama").spec, CONFIG, "lora_bias")


class _PackedWeights:
    """Weights as a quantised checkpoint has them."""

    def tensor(self, _name: str) -> torch.Tensor:
        return torch.zeros(512, 1, dtype=torch.uint8)


def test_dora_on_quantised_weights_is_refused(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    spec = dataclasses.replace(bases("llama").spec, weights=_PackedWeights())
    key = Q0_A.replace("lora_A.weight", "lora_magnitude_vector")
    error = refused(UnsupportedFeatureError, tmp_path, spec, WEIGHTS, key)
    assert "before quantisation" in str(error)


def test_dora_without_a_direction_is_refused(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"], use_dora=True, r=4)
    spec = dataclasses.replace(bases("llama").spec, weights=_ZeroWeights())
    edit_tensors(tmp_path, lambda tensors: tensors[Q0_B].zero_())
    key = Q0_A.replace("lora_A.weight", "lora_magnitude_vector")
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, key)


class _ZeroWeights:
    """A base model that is all zero."""

    def tensor(self, _name: str) -> torch.Tensor:
        return torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("key", "shape"), [(Q0_A, (4, 33)), (Q0_B, (31, 4)), (Q0_A, (4, 32, 1)), (Q0_B, (4,))]
)
def test_a_wrong_shape_is_named_with_what_the_base_asks_for(
    key: str, shape: tuple[int, ...], folder: Path, bases: Any
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    error = refused(BaseMismatchError, folder, bases("llama").spec, WEIGHTS, key)
    assert str(list(shape)) in str(error)
    assert "model.layers.0.self_attn.q_proj" in str(error)
    assert ("[4, 32]" if key == Q0_A else "[32, 4]") in str(error)


def test_a_rank_that_the_configuration_denies_is_named(folder: Path, bases: Any) -> None:
    edit_config(folder, rank_pattern={"layers.0.self_attn.q_proj": 2})
    error = refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, Q0_A)
    assert "rank 2" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(value: float, folder: Path, bases: Any) -> None:
    edit_tensors(folder, lambda tensors: tensors[Q0_B].__setitem__((3, 1), value))
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, Q0_B)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_an_unsupported_dtype_is_named(dtype: torch.dtype, folder: Path, bases: Any) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q0_B: tensors[Q0_B].to(dtype)}))
    refused(UnsupportedFeatureError, folder, bases("llama").spec, WEIGHTS, Q0_B)


def test_a_resized_vocabulary_whose_tokens_nothing_names_is_refused(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, target_modules=["q_proj"])
    key = "base_model.model.model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(60, 32)}))
    error = refused(InvalidAdapterError, tmp_path, bases("llama").spec, "tokenizer.json", None)
    assert "60 tokens, the base 53" in str(error)


def test_a_missing_bias_is_named(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"], bias="all")
    key = "base_model.model.model.layers.1.self_attn.v_proj.bias"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    refused(InvalidAdapterError, tmp_path, bases("llama").spec, WEIGHTS, key)


def test_biases_need_the_weights_of_the_base(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"], bias="lora_only")
    spec = dataclasses.replace(bases("llama").spec, weights=None)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    refused(BaseModelError, tmp_path, spec, WEIGHTS, key)


def test_a_whole_model_is_refused_by_name(bases: Any) -> None:
    base = bases("llama")
    error = refused(UnsupportedFeatureError, base.folder, base.spec, "model.safetensors", None)
    assert "not an adapter" in str(error)


def test_a_missing_folder_is_named(bases: Any, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    refused(InvalidAdapterError, absent, bases("llama").spec, str(absent), None)


def test_a_refused_adapter_leaves_the_store_as_it_was(
    folder: Path, bases: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    good = add_adapter(store, "mine", folder, bases("llama").spec)
    edit_config(folder, layer_replication=[[0, 2]])
    with pytest.raises(UnsupportedFeatureError):
        add_adapter(store, "mine", folder, bases("llama").spec)
    assert store.versions("mine") == (good.version,)


def test_reading_leaves_a_good_adapter_as_it_is(folder: Path, bases: Any) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    read_peft(folder, bases("llama").spec)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
