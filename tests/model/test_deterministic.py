"""--deterministic: the product that linears take, and the models that can't have it on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_model
from torch import nn
from transformers import LlamaConfig

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.adapter_layers import BaseLinear, base_linear
from quickchange_server.model.loading.model_loader import _refuse_loose_sums, load_model


def test_every_linear_of_the_base_sums_in_the_fixed_order(
    tmp_path: Path,
) -> None:
    path = save_model("llama", tmp_path / "llama")
    device = torch.device("cpu")  # in a dtype whose rows stay as they are, as a GPU's do
    loaded = {
        fixed: load_model(
            str(path), dtype=torch.float16, device=device, adapters=True, deterministic=fixed
        )
        for fixed in (False, True)
    }
    for fixed, model in loaded.items():
        linears = [each for each in model.module.modules() if isinstance(each, BaseLinear)]
        assert len(linears) > 4
        names = {each._product.__name__ for each in linears}
        assert names == {"linear_fixed" if fixed else "linear"}


def test_on_a_cpu_the_bits_stay_as_they_are() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(300, 70), torch.randn(5, 300)
    with torch.inference_mode():
        plain, fixed = (base_linear(module, deterministic=on)(x) for on in (False, True))
    assert torch.equal(plain, fixed)


def test_a_quantised_checkpoint_is_refused_on_a_gpu_and_not_on_a_cpu() -> None:
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes"})
    _refuse_loose_sums(nn.Linear(2, 2), config, ranks=1)
    with pytest.raises(UnsupportedModelError, match=r"--deterministic .* stored quantised"):
        _refuse_loose_sums(nn.Linear(2, 2, device="meta"), config, ranks=1)


def test_more_than_two_ranks_are_refused_on_a_gpu() -> None:
    _refuse_loose_sums(nn.Linear(2, 2, device="meta"), LlamaConfig(), ranks=2)
    with pytest.raises(UnsupportedModelError, match="--tensor-parallel"):
        _refuse_loose_sums(nn.Linear(2, 2, device="meta"), LlamaConfig(), ranks=3)
