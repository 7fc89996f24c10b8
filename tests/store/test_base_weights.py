"""A base model is loaded whole or refused by the names of what is missing or left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model, save_model

from quickchange_store.base_model.base_weights import load_base
from quickchange_store.errors import BaseModelError

Weights = dict[str, torch.Tensor]
FILE = "model.safetensors"


def changed(folder: Path, change: Callable[[Weights], Weights], family: str = "llama") -> str:
    """A tiny model on disk whose tensors are those that `change` returns."""
    path = save_model(family, folder)
    weights = change(load_file(path / FILE))
    save_file({name: t.clone() for name, t in weights.items()}, path / FILE, {"format": "pt"})
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_loaded_with_its_own_weights(family: str, tmp_path: Path) -> None:
    loaded = load_base(str(save_model(family, tmp_path)))
    for name, weight in make_model(family).named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_tensor_left_out_is_named(tmp_path: Path, data: st.DataObject) -> None:
    names = sorted(make_model("llama").state_dict())
    gone = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
    path = changed(tmp_path, lambda w: {n: t for n, t in w.items() if n not in gone})
    with pytest.raises(BaseModelError, match=min(gone)) as error:
        load_base(path)
    assert "no weights for some of its parameters" in str(error.value)


def test_a_wrong_prefix_names_both_sides(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda w: {f"transformer.{name}": t for name, t in w.items()})
    with pytest.raises(BaseModelError, match=r"lm_head.weight.*and 37 more.*transformer.lm_head"):
        load_base(path)


def test_a_config_of_fewer_layers_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(BaseModelError, match=r"no place for: model.layers.2.input_layernorm"):
        load_base(str(path))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.1.self_attn.q_proj.lora_A.default.weight",
        "model.layers.1.self_attn.q_proj.weight_scale",
    ],
)
def test_a_part_of_a_module_that_would_be_dropped_is_refused(extra: str, tmp_path: Path) -> None:
    path = changed(tmp_path, lambda w: {**w, extra: torch.ones(48)})
    with pytest.raises(BaseModelError, match=extra):
        load_base(path)


@pytest.mark.parametrize(
    "extra",
    ["model.vision_tower.conv.weight", "mtp.0.fc.weight", "model.layers.0.rotary_emb.inv_freq"],
)
def test_parts_beside_the_language_model_are_left_aside(extra: str, tmp_path: Path) -> None:
    load_base(changed(tmp_path, lambda w: {**w, extra: torch.ones(4)}))


def test_another_shape_is_named(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda w: {**w, "lm_head.weight": torch.ones(90, 48)})
    with pytest.raises(BaseModelError, match=r"other shapes.*lm_head.weight"):
        load_base(path)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    path = changed(tmp_path, dict, "llama-tied")
    assert "lm_head.weight" not in load_file(Path(path) / FILE)
    loaded = load_base(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / f"{FILE}.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = sharded / index[name]
    kept = {n: t.clone() for n, t in load_file(shard).items() if n != name}
    save_file(kept or {"nothing": torch.ones(1)}, shard, {"format": "pt"})
    with pytest.raises(BaseModelError, match=name):
        load_base(str(sharded))


def test_a_missing_shard_is_an_error_of_reading(sharded: Path) -> None:
    shard = max(sharded.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(BaseModelError, match=shard.name):
        load_base(str(sharded))
