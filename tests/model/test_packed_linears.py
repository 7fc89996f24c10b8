"""A base's linears in panels: what is packed, what keeps its rows, and what both take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from quickchange_kernels.linear.linear_panels import unpack_panels
from quickchange_server.model.adapter_layers import (
    BaseLinear,
    PackedLinear,
    base_linear,
    sharing_weights,
)
from quickchange_server.model.fusion import FusedDecoderLayer
from quickchange_server.model.loading.model_loader import LoadedModel, load_model

CPU = torch.device("cpu")


def loaded(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    path = str(save_model(family, folder))
    return load_model(path, dtype=dtype, device=CPU, adapters=True)


def packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt_neox"])
def test_every_linear_but_the_head_is_packed(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path)
    rows = [module for module in model.module.modules() if isinstance(module, BaseLinear)]
    assert rows == [model.head.base]
    assert len(packed(model.module)) > 4


def test_layers_are_fused_as_with_rows(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path).module
    assert sum(isinstance(module, FusedDecoderLayer) for module in model.modules()) == 3


def test_a_tied_head_and_its_embedding_stay_one_matrix(tmp_path: Path) -> None:
    model = loaded("llama-tied", tmp_path)
    original = make_model("llama-tied").get_input_embeddings().weight
    assert model.embedding.weight is model.head.weight
    assert torch.equal(model.embedding.weight, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stand_once_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded("llama-tied", tmp_path, dtype).module
    held = {
        t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    for module in packed(model):
        held[module.weight.data_ptr()] = module.weight.untyped_storage().nbytes()
    weights = sum(p.numel() for p in make_model("llama-tied").parameters()) * dtype.itemsize
    assert sum(held.values()) < 1.01 * weights  # with the tables of rotary positions


def test_a_packed_weight_tells_its_shape_and_dtype(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path, torch.bfloat16).module
    original = make_model("llama").model.layers[0].self_attn.o_proj.weight
    o_proj = model.model.layers[0].self_attn.o_proj
    assert (o_proj.weight.shape, o_proj.weight.dtype) == (original.shape, torch.bfloat16)
    held = unpack_panels(o_proj.base.panels, *original.shape)
    assert torch.equal(held, original.to(torch.bfloat16))


def test_a_linear_whose_weight_the_model_reads_itself_keeps_its_rows(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj's weight. The proof at load would tell if that were nothing."""
    sizes = {"hidden_size": 32, "state_size": 8, "time_step_rank": 16, "num_hidden_layers": 2}
    config = MambaConfig(vocab_size=97, **sizes)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device=CPU, adapters=False)
    kept = {name for name, one in model.module.named_modules() if isinstance(one, BaseLinear)}
    assert kept == {"lm_head", *(f"backbone.layers.{n}.mixer.dt_proj" for n in range(2))}


def test_linears_that_share_a_weight_are_found() -> None:
    shared = make_model("llama")
    first, second = (shared.model.layers[index].mlp for index in (0, 1))
    second.down_proj.weight = first.down_proj.weight
    assert sharing_weights(shared) == {first.down_proj, second.down_proj}


def test_a_dtype_without_panels_keeps_its_rows() -> None:
    half = nn.Linear(20, 32).to(torch.float16).requires_grad_(False)
    assert isinstance(base_linear(half, rows_read=False), BaseLinear)
    assert isinstance(base_linear(half.to(torch.bfloat16), rows_read=False), PackedLinear)


@pytest.mark.parametrize(
    ("features", "width", "kind"),
    [(20, 32, PackedLinear), (20, 30, BaseLinear), (21, 32, BaseLinear)],
)
def test_a_weight_that_panels_would_enlarge_keeps_its_rows(
    features: int, width: int, kind: type[nn.Module]
) -> None:
    linear = nn.Linear(features, width).to(torch.bfloat16).requires_grad_(False)
    assert isinstance(base_linear(linear, rows_read=False), kind)


def test_packed_and_by_rows_are_the_same_linear() -> None:
    linear = nn.Linear(70, 112).requires_grad_(False)
    x = torch.randn(5, 70)
    with torch.inference_mode():
        torch.testing.assert_close(base_linear(linear, rows_read=False)(x), base_linear(linear)(x))
