"""A model whose weights are missing or not finite is not served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.loading.model_loader import load_model

FILE = "model.safetensors"


def load(path: Path, dtype: torch.dtype = torch.float32) -> None:
    load_model(str(path), dtype=dtype, device=torch.device("cpu"), adapters=True)


def test_a_missing_tensor_is_a_settings_error_that_names_it(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    weights = load_file(path / FILE)
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, path / FILE, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.down_proj") as error:
        load(path)
    assert error.value.param == "model"


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(name: str, value: float, tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    weights = load_file(path / FILE)
    weights[f"model.layers.1.{name}"][0] = value
    save_file(weights, path / FILE, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"model.layers.1.{name}"):
        load(path)


def test_weights_beyond_the_served_dtype_name_the_dtype(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    weights = load_file(path / FILE)
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, path / FILE, {"format": "pt"})
    load(path, torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"float16.*model\.norm.*--dtype"):
        load(path, torch.float16)
