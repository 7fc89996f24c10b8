"""AdapterHub directories: what a configuration comes to, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickchange_store.canonical import adapter_bytes
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HIDDEN = 32
O_PROJ, DOWN_PROJ = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"
FIRST = "model.layers.0.output_adapters.adapters.mine."
HOULSBY: dict[str, Any] = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 8,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "scaling": 1.0,
    "leave_out": [],
}


def write(folder: Path, *, config: dict[str, Any] | None = None, **whole: Any) -> Path:
    """A Houlsby adapter for a llama of two layers, in the layout of the library's version 1.3."""
    settings = {**HOULSBY, **(config or {})}
    content = {
        "config": settings,
        "hidden_size": HIDDEN,
        "model_class": "LlamaForCausalLM",
        "model_name": "tiny",
        "model_type": "llama",
        "name": "mine",
        "version": "adapters.1.3.0",
        **whole,
    }
    (folder / CONFIG).write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "adapter_down.0.weight": (4, HIDDEN),
        "adapter_down.0.bias": (4,),
        "adapter_up.weight": (HIDDEN, 4),
        "adapter_up.bias": (HIDDEN,),
    }
    tensors = {
        f"model.layers.{layer}.{part}.adapters.mine.{name}": torch.randn(shape, generator=generator)
        for layer in range(2)
        for part in ("attention_adapters", "output_adapters")
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(
    kind: type[StoreError], folder: Path, base: Any, file: str, key: str | None
) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base)
    assert type(caught.value) is kind
    assert (caught.value.file, caught.value.key) == (file, key)
    assert caught.value.remedy
    return caught.value


def test_each_sublayer_gets_its_bottleneck(bases: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, config={"scaling": 2.0})
    updates = read_adapter(folder, bases("llama").spec).adapter.updates
    assert set(updates) == {path.format(i) for path in (O_PROJ, DOWN_PROJ) for i in range(2)}
    tensors, update = load_file(folder / WEIGHTS), updates[DOWN_PROJ.format(0)]
    assert torch.equal(update.a, tensors[f"{FIRST}adapter_down.0.weight"])
    assert torch.equal(update.b, tensors[f"{FIRST}adapter_up.weight"])
    assert update.shift is not None
    assert torch.equal(update.shift, tensors[f"{FIRST}adapter_down.0.bias"])
    assert update.bias is not None
    assert torch.equal(update.bias, 2 * tensors[f"{FIRST}adapter_up.bias"])  # scaled as the rest is
    assert (update.scale, update.activation, update.source) == (2.0, "silu", "output")


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({}, "output"),
        ({"original_ln_before": True}, "stream"),
        (
            {"original_ln_before": True, "residual_before_ln": False, "original_ln_after": False},
            "stream",
        ),
        ({"residual_before_ln": False}, "output"),
        ({"is_parallel": True}, "residual"),
        (
            {"is_parallel": True, "residual_before_ln": False, "original_ln_before": True},
            "residual",
        ),
    ],
)
def test_what_the_bottleneck_reads_follows_from_the_residual_settings(
    config: dict[str, Any], source: str, bases: Any, tmp_path: Path
) -> None:
    adapter = read_adapter(write(tmp_path, config=config), bases("llama").spec).adapter
    assert {update.source for update in adapter.updates.values()} == {source}


@pytest.mark.parametrize(
    ("name", "whole", "activation"),
    [
        ("relu", {}, "relu"),
        ("ReLU", {}, "relu"),
        ("gelu", {}, "gelu"),
        ("gelu_new", {}, "gelu_tanh"),
        ("tanh", {}, "tanh"),
        ("linear", {}, "identity"),
        ("gelu", {"version": None}, "gelu"),
        ("gelu", "unversioned", "gelu_tanh"),
        ("gelu_orig", "unversioned", "gelu"),
    ],
)
def test_activations_are_known_by_the_librarys_names(
    name: str, whole: Any, activation: str, bases: Any, tmp_path: Path
) -> None:
    folder = write(
        tmp_path, config={"non_linearity": name}, **(whole if whole != "unversioned" else {})
    )
    if whole == "unversioned":
        content = json.loads((folder / CONFIG).read_text())
        del content["version"]
        (folder / CONFIG).write_text(json.dumps(content))
    adapter = read_adapter(folder, bases("llama").spec).adapter
    assert {update.activation for update in adapter.updates.values()} == {activation}


def test_an_adapter_saved_without_its_models_prefix_is_the_same(bases: Any, tmp_path: Path) -> None:
    folder, spec = write(tmp_path), bases("llama").spec
    before = adapter_bytes.digest(read_adapter(folder, spec).adapter)
    tensors = load_file(folder / WEIGHTS)
    save_file({k.removeprefix("model."): t for k, t in tensors.items()}, folder / WEIGHTS)
    assert adapter_bytes.digest(read_adapter(folder, spec).adapter) == before


def test_a_stored_adapter_is_read_back(bases: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    added = add_adapter(store, "mine", write(tmp_path), bases("llama").spec)
    loaded = store.load(added.version.digest)
    assert adapter_bytes.digest(loaded) == added.version.digest
    update = loaded.updates[O_PROJ.format(1)]
    assert (update.activation, update.source, update.rank) == ("silu", "output", 4)
    assert store.info(added.version.digest).source["format"] == "adapterhub"


def test_another_base_name_warns_and_nothing_more(bases: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, model_name="someone/other-model")
    (warning,) = read_adapter(folder, bases("llama").spec).warnings
    assert "someone/other-model" in warning


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("phm_layer", True, UnsupportedFeatureError),
        ("ln_before", True, UnsupportedFeatureError),
        ("ln_after", True, UnsupportedFeatureError),
        ("use_gating", True, UnsupportedFeatureError),
        ("inv_adapter", "nice", UnsupportedFeatureError),
        ("cross_adapter", True, UnsupportedFeatureError),
        ("architecture", "lora", UnsupportedFeatureError),
        ("architecture", "union", UnsupportedFeatureError),
        ("non_linearity", "leakyrelu", UnsupportedFeatureError),
        ("non_linearity", None, InvalidAdapterError),
        ("original_ln_after", False, UnsupportedFeatureError),
        ("residual_before_ln", "post_add", UnsupportedFeatureError),
        ("reduction_factor", 0, InvalidAdapterError),
        ("reduction_factor", {"7": 2}, InvalidAdapterError),
        ("reduction_factor", None, InvalidAdapterError),
        ("scaling", "loud", InvalidAdapterError),
        ("leave_out", "0", InvalidAdapterError),
        ("mh_adapter", 1, InvalidAdapterError),
        ("a_field_of_the_future", 3, UnsupportedFeatureError),
    ],
)
def test_a_setting_that_can_not_be_followed_is_named(
    field: str, value: Any, kind: type[StoreError], bases: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path, config={field: value})
    with pytest.raises(kind) as caught:
        read_adapter(folder, bases("llama").spec)
    assert caught.value.file == CONFIG
    assert caught.value.key is not None
    assert caught.value.key.startswith(f"config.{field}")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"original_ln_before": True, "residual_before_ln": False},
        {"original_ln_before": True, "original_ln_after": False},
        {"is_parallel": True, "original_ln_after": False},
    ],
)
def test_a_residual_stream_that_is_lost_or_doubled_is_refused(
    config: dict[str, Any], bases: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedFeatureError, match="residual stream"):
        read_adapter(write(tmp_path, config=config), bases("llama").spec)


def test_a_configuration_without_any_place_is_refused(bases: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, config={"mh_adapter": False, "output_adapter": False})
    key = "config.mh_adapter, config.output_adapter"
    refused(InvalidAdapterError, folder, bases("llama").spec, CONFIG, key)


@pytest.mark.parametrize(
    ("whole", "kind", "key"),
    [
        ({"model_type": "bert"}, BaseMismatchError, "model_type"),
        ({"name": None}, InvalidAdapterError, "name"),
        ({"a_field_of_the_future": 1}, UnsupportedFeatureError, "a_field_of_the_future"),
    ],
)
def test_a_wrong_heading_is_named(
    whole: dict[str, Any], kind: type[StoreError], key: str, bases: Any, tmp_path: Path
) -> None:
    refused(kind, write(tmp_path, **whole), bases("llama").spec, CONFIG, key)


def test_a_configuration_given_by_name_alone_is_refused(bases: Any, tmp_path: Path) -> None:
    content = {"config": "pfeiffer", "model_type": "llama", "name": "mine"}
    (write(tmp_path) / CONFIG).write_text(json.dumps(content))
    refused(InvalidAdapterError, tmp_path, bases("llama").spec, CONFIG, "config")


def test_a_base_with_other_names_is_refused(bases: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, model_type="gpt_neox")
    refused(BaseMismatchError, folder, bases("gpt_neox").spec, CONFIG, "model_type")


def test_reading_through_a_norm_is_refused(bases: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, model_type="gemma3_text", config={"original_ln_before": True})
    refused(
        UnsupportedFeatureError, folder, bases("gemma3").spec, CONFIG, "config.original_ln_before"
    )


@pytest.mark.parametrize(
    "file",
    ["head_config.json", "model_head.safetensors", "adapter_fusion_config.json", "embedding.pt"],
)
def test_what_lies_beside_the_adapter_is_not_ignored(file: str, bases: Any, tmp_path: Path) -> None:
    (write(tmp_path) / file).write_bytes(b"")
    refused(UnsupportedFeatureError, tmp_path, bases("llama").spec, file, None)


def test_a_pickle_is_the_same_adapter(bases: Any, tmp_path: Path) -> None:
    """AdapterHub's own default."""
    base = bases("llama").spec
    before = adapter_bytes.digest(read_adapter(write(tmp_path), base).adapter)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "pytorch_adapter.bin")
    (tmp_path / WEIGHTS).unlink()
    assert adapter_bytes.digest(read_adapter(tmp_path, base).adapter) == before


def test_a_missing_tensor_is_named(bases: Any, tmp_path: Path) -> None:
    key = f"{FIRST}adapter_down.0.bias"
    edit(write(tmp_path), lambda tensors: tensors.pop(key))
    refused(InvalidAdapterError, tmp_path, bases("llama").spec, WEIGHTS, key)


def test_a_tensor_that_nothing_explains_is_named(bases: Any, tmp_path: Path) -> None:
    key = f"{FIRST}gate.weight"
    edit(write(tmp_path), lambda tensors: tensors.update({key: torch.zeros(1, HIDDEN)}))
    refused(InvalidAdapterError, tmp_path, bases("llama").spec, WEIGHTS, key)


def test_a_bottleneck_of_another_width_is_named(bases: Any, tmp_path: Path) -> None:
    write(tmp_path, config={"reduction_factor": {"0": 16, "default": 8}})
    key = "model.layers.0.attention_adapters.adapters.mine.adapter_down.0.weight"
    error = refused(BaseMismatchError, tmp_path, bases("llama").spec, WEIGHTS, key)
    assert "[2, 32]" in str(error)


def test_a_value_that_is_not_finite_is_named(bases: Any, tmp_path: Path) -> None:
    key = f"{FIRST}adapter_up.weight"
    edit(write(tmp_path), lambda tensors: tensors[key].__setitem__((1, 1), float("nan")))
    refused(InvalidAdapterError, tmp_path, bases("llama").spec, WEIGHTS, key)
