"""Which modules of a base model are fused, by family. That outputs stay is tested elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_model
from torch import nn

from quickchange_server.model.adapter_layers import ProjectionPart, SharedProjection
from quickchange_server.model.fusion import (
    FusedAttention,
    FusedDecoderLayer,
    FusedGatedMLP,
    FusedRMSNorm,
)
from quickchange_server.model.loading.model_loader import load_model

LAYERS = 3


def loaded(family: str, folder: Path) -> nn.Module:
    path = save_model(family, folder)
    return load_model(
        str(path), dtype=torch.float32, device=torch.device("cpu"), adapters=True
    ).module


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_llama_like_models_have_whole_layers_fused(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path)
    assert count(model, FusedRMSNorm) == 2 * LAYERS + 1
    assert count(model, FusedGatedMLP) == LAYERS
    assert count(model, FusedDecoderLayer) == LAYERS
    assert count(model, SharedProjection) == 2 * LAYERS
    assert count(model, ProjectionPart) == 0


def test_each_layers_last_sum_is_made_with_the_next_norm(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    layers = [each for each in model.modules() if isinstance(each, FusedDecoderLayer)]
    follow = [layer.following for layer in layers]
    firsts = [layer.input_layernorm for layer in layers[1:]]
    assert follow == [(norm,) for norm in [*firsts, model.get_submodule("model.norm")]]
    assert "following" not in dict(layers[0].named_modules())


def test_a_norm_that_is_ready_serves_only_the_stream_that_it_was_made_of() -> None:
    norm = FusedRMSNorm(nn.Parameter(torch.ones(8), requires_grad=False), 1e-6, 0.0)
    x, other, made = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.zeros(2, 8)
    norm.ready = (x, made)
    assert norm(x) is made
    assert norm(x) is not made
    norm.ready = (x, made)
    assert norm(other) is not made
    assert norm(x) is not made


def test_qwen3_has_its_head_norms_fused_too(tmp_path: Path) -> None:
    model = loaded("qwen3", tmp_path)
    assert count(model, FusedRMSNorm) == 4 * LAYERS + 1
    assert count(model, FusedDecoderLayer) == LAYERS


def test_gemma_norms_take_one_plus_weight_and_its_gelu_mlp_stays(tmp_path: Path) -> None:
    model = loaded("gemma", tmp_path)
    offsets = {m.offset for m in model.modules() if isinstance(m, FusedRMSNorm)}
    assert offsets == {1.0}
    assert count(model, FusedGatedMLP) == 0


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_layers_that_only_look_alike_stay_but_for_their_attention(
    family: str, tmp_path: Path
) -> None:
    model = loaded(family, tmp_path)
    assert count(model, FusedAttention) == LAYERS
    assert count(model, FusedDecoderLayer) == 0


def test_attention_that_rotates_other_columns_stays(tmp_path: Path) -> None:
    model = loaded("cohere", tmp_path)
    assert count(model, FusedAttention) == 0
    assert count(model, ProjectionPart) == 3 * LAYERS


def test_a_model_of_other_parts_is_left_alone(tmp_path: Path) -> None:
    model = loaded("gpt_neox", tmp_path)
    assert count(model, FusedRMSNorm) == 0
    assert count(model, ProjectionPart) == 0
