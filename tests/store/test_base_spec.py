"""The base model's spec, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import ModuleShape
from quickchange_store.errors import BaseModelError


def test_modules_are_all_linears_the_input_embedding_and_norms(bases: Any) -> None:
    spec = bases("llama").spec
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.model_type == "llama"
    assert spec.output_head == "lm_head"
    assert len(spec.modules) == 2 * 7 + 2 + 2 * 2 + 1
    assert spec.modules["model.norm"] == ModuleShape("norm", 32, 32)
    assert spec.modules["model.embed_tokens"] == ModuleShape("embedding", 53, 32)
    assert spec.modules["model.layers.1.self_attn.k_proj"] == ModuleShape("linear", 32, 16, True)
    assert spec.modules["model.layers.0.mlp.down_proj"] == ModuleShape("linear", 48, 32)


def test_a_tied_lm_head_is_a_linear_like_any_other(bases: Any) -> None:
    assert bases("llama-tied").spec.modules["lm_head"] == ModuleShape("linear", 32, 53)


def test_a_scaled_embedding_says_its_scale(bases: Any) -> None:
    scale = bases("gemma3").spec.modules["model.embed_tokens"].output_scale
    assert scale == pytest.approx(32**0.5)


def test_a_norm_says_what_it_adds_to_its_weight(bases: Any) -> None:
    path = "model.layers.1.post_feedforward_layernorm"
    assert bases("gemma3").spec.modules[path] == ModuleShape("norm", 32, 32, weight_offset=1.0)
    assert bases("gpt2").spec.modules["transformer.ln_f"] == ModuleShape("norm", 32, 32, True)


def test_no_weights_are_needed_for_the_spec(bases: Any, tmp_path: Path) -> None:
    config = (bases("llama").folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert base_spec(tmp_path).modules == bases("llama").spec.modules


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt_neox", "gemma3"])
def test_weights_are_the_parameters_that_transformers_loads(family: str, bases: Any) -> None:
    base = bases(family)
    for path in base.spec.modules:
        expected = base.model.get_submodule(path).weight
        assert torch.equal(base.spec.weights.tensor(f"{path}.weight"), expected), path


def test_weights_are_found_in_shards(bases: Any, tmp_path: Path) -> None:
    bases("llama").model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    weights = base_spec(tmp_path).weights
    assert weights is not None
    expected = bases("llama").model.lm_head.weight
    assert torch.equal(weights.tensor("lm_head.weight"), expected)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="absent") as error:
        base_spec(tmp_path / "absent")
    assert error.value.remedy is not None


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(BaseModelError, match="no-such-type"):
        base_spec(tmp_path)


def test_missing_weights_are_named_when_they_are_needed(bases: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bases("llama").folder / "config.json").read_text())
    weights = base_spec(tmp_path).weights
    assert weights is not None
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        weights.tensor("lm_head.weight")


@pytest.mark.parametrize("kind", ["pix2struct", "t5"])
def test_models_that_need_more_than_text_are_refused_by_type(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(BaseModelError, match=f"{kind}|not a causal language model"):
        base_spec(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no configuration"),
        ({"config.json": "{"}, "no configuration"),
        ({"config.json": "[]"}, "no configuration"),
        ({"config.json": '{"model_type": null}'}, "no configuration"),
        ({"config.json": '{"model_type": "not-known-yet"}'}, "not-known-yet"),
        ({"config.json": '{"model_type": "llama", "num_attention_heads": 5}'}, "attention heads"),
        ({"config.json": '{"model_type": "llama", "hidden_size": "wide"}'}, "hidden_size"),
        ({"config.json": '{"model_type": "t5"}'}, "t5"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a base model"),
        (
            {"config.json": '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}'},
            "custom code",
        ),
    ],
)
def test_a_folder_that_is_no_base_is_refused_with_the_reason(
    files: dict[str, str], says: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BaseModelError, match=says) as refused:
        base_spec(tmp_path)
    assert refused.value.remedy
