"""IA3 directories as PEFT saves them: the factors as they were, or a refusal by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
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
from quickchange_store.formats.peft.ia3 import HARMLESS, HONOURED
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def save(bases: Any, tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a random IA3 adapter of a family and gives its folder."""

    def make(family: str = "llama", **options: Any) -> Path:
        import copy

        from peft import IA3Config, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves embeddings too
            config = IA3Config(task_type="CAUSAL_LM", **options)
            model = get_peft_model(copy.deepcopy(bases(family).model), config)
            for name, parameter in model.named_parameters():
                if "ia3_l" in name:
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(tmp_path)
        return tmp_path

    return make


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(kind: type[StoreError], folder: Path, base: Any, file: str, key: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base)
    assert type(caught.value) is kind
    assert (caught.value.file, caught.value.key) == (file, key)
    assert caught.value.remedy
    return caught.value


def test_an_output_gets_its_factors_and_no_rank(bases: Any, save: Any) -> None:
    folder = save(target_modules=["v_proj"], feedforward_modules=[])
    updates = read_adapter(folder, bases("llama").spec).adapter.updates
    path = "model.layers.1.self_attn.v_proj"
    saved = load_file(folder / WEIGHTS)[f"base_model.model.{path}.ia3_l"]
    assert updates[path].rank == 0
    assert updates[path].bias is None
    assert torch.equal(updates[path].gain, saved.flatten())


def test_the_input_of_down_proj_is_the_output_of_up_proj(bases: Any, save: Any) -> None:
    folder = save(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    updates = read_adapter(folder, bases("llama").spec).adapter.updates
    saved = load_file(folder / WEIGHTS)[f"base_model.model.{DOWN}.ia3_l"]
    assert torch.equal(updates[UP].gain, saved.flatten())
    assert DOWN not in updates


def test_a_stored_adapter_is_read_back(bases: Any, save: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = save(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    added = add_adapter(store, "mine", folder, bases("llama").spec)
    loaded = store.load(added.version.digest)
    assert adapter_bytes.digest(loaded) == added.version.digest
    assert store.info(added.version.digest).ranks == (0,)
    assert loaded.parameters == 2 * (32 + 48)


def test_an_input_that_no_module_produces_is_refused(bases: Any, save: Any) -> None:
    folder = save("gpt_neox")  # dense_4h_to_h reads gelu(dense_h_to_4h(x))
    error = refused(
        UnsupportedFeatureError, folder, bases("gpt_neox").spec, CONFIG, "feedforward_modules"
    )
    assert "dense_4h_to_h" in str(error)


def test_an_mlp_with_a_norm_before_down_proj_is_not_taken_for_a_gated_one(
    bases: Any, save: Any
) -> None:
    folder = save(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    spec = dataclasses.replace(bases("llama").spec, producers={})
    refused(UnsupportedFeatureError, folder, spec, CONFIG, "feedforward_modules")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("modules_to_save", "lm_head", InvalidAdapterError),
        ("a_field_of_the_future", 3, UnsupportedFeatureError),
        ("feedforward_modules", 5, InvalidAdapterError),
        ("feedforward_modules", "(down_proj", InvalidAdapterError),
        ("target_modules", ["c_attn"], BaseMismatchError),
    ],
)
def test_a_field_that_can_not_be_followed_is_named(
    field: str, value: Any, kind: type[StoreError], bases: Any, save: Any
) -> None:
    folder = save(target_modules=["q_proj"], feedforward_modules=[])
    edit_config(folder, **{field: value})
    refused(kind, folder, bases("llama").spec, CONFIG, field)


def test_a_tensor_that_nothing_asks_for_is_named(bases: Any, save: Any) -> None:
    folder = save(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    edit_config(folder, target_modules=["v_proj"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
    refused(InvalidAdapterError, folder, bases("llama").spec, WEIGHTS, key)


def test_factors_of_another_width_are_another_base(bases: Any, save: Any) -> None:
    folder = save(target_modules=["q_proj"], feedforward_modules=[])
    key = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
    save_file({**load_file(folder / WEIGHTS), key: torch.ones(31, 1)}, folder / WEIGHTS)
    refused(BaseMismatchError, folder, bases("llama").spec, WEIGHTS, key)


def test_an_input_that_training_took_for_an_output_is_named(bases: Any, save: Any) -> None:
    folder = save(target_modules=["down_proj"], feedforward_modules=[])
    edit_config(folder, feedforward_modules=["down_proj"])
    key = f"base_model.model.{DOWN}.ia3_l"
    with pytest.raises(BaseMismatchError, match=DOWN):
        read_adapter(folder, bases("llama").spec)
    assert load_file(folder / WEIGHTS)[key].shape == (32, 1)


def test_every_field_of_pefts_ia3_config_is_classified_once() -> None:
    from peft import IA3Config

    fields = {field.name for field in dataclasses.fields(IA3Config)}
    groups = [HONOURED, HARMLESS]
    assert fields - frozenset().union(*groups) == set()
    assert sum(len(group) for group in groups) == len(frozenset().union(*groups))
