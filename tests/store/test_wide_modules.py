"""Modules wide enough to be measured by one call give the change that PEFT merges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.hra.layer import HRALinear
from peft.utils.save_and_load import get_peft_model_state_dict

from quickchange_store.canonical.canonical_adapter import ModuleShape
from quickchange_store.errors import UnsupportedFeatureError
from quickchange_store.formats.low_rank import exact_factors
from quickchange_store.formats.tuners.bare_model import BareModule, WeightChange, changes

OUT, IN, PATH = 104, 136, "q_proj"
KINDS: dict[str, tuple[PeftConfig, int]] = {  # and the rank of the change
    "hra": (HRAConfig(r=6, target_modules=[PATH]), 6),
    "loha": (LoHaConfig(r=4, target_modules=[PATH]), 16),
    "loha of a high rank": (LoHaConfig(r=8, target_modules=[PATH]), 64),
    "miss": (MissConfig(r=8, target_modules=[PATH]), 8),
    "vera": (VeraConfig(r=8, target_modules=[PATH]), 8),
    "randlora": (RandLoraConfig(r=8, target_modules=[PATH]), OUT),
    "lora with biases": (LoraConfig(r=8, target_modules=[PATH], bias="all"), 8),
}


def made(config: PeftConfig) -> tuple[Any, BareModule, dict[str, torch.Tensor]]:
    """PEFT's model around one random module, that module, and the adapter's tensors."""
    torch.manual_seed(1)
    model = torch.nn.Module()
    model.add_module(PATH, torch.nn.Linear(IN, OUT))
    own = model.get_submodule(PATH)
    assert isinstance(own, torch.nn.Linear)
    weight, bias = own.weight.detach().clone(), own.bias.detach().clone()
    peft = get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    tensors = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(peft).items()}
    shape = ModuleShape("linear", IN, OUT, bias=True)
    return peft.double().eval(), BareModule(PATH, shape, weight, bias), tensors


def change_of(config: PeftConfig, module: BareModule, tensors: Any) -> WeightChange:
    plain = copy.deepcopy(config)
    plain.inference_mode = True
    (change,) = changes(plain, [module], tensors)
    return change


@pytest.mark.parametrize("name", KINDS)
def test_the_change_is_what_pefts_layer_adds(name: str) -> None:
    config, rank = KINDS[name]
    model, module, tensors = made(config)
    change = change_of(config, module, tensors)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert module.weight is not None
    assert module.bias is not None
    own = x @ module.weight.double().T + module.bias.double()
    with torch.no_grad():
        expected = model.get_submodule(f"base_model.model.{PATH}")(x) - own
    got = x @ change.weight.T + (0 if change.bias is None else change.bias)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    found = exact_factors(change.weight, OUT)
    assert found is not None
    assert len(found.a) == rank


def test_a_low_rank_change_takes_one_call_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = KINDS["hra"]
    _, module, tensors = made(config)
    calls = []
    real = HRALinear.get_delta_weight

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(args)
        return real(*args, **named)

    monkeypatch.setattr(HRALinear, "get_delta_weight", counted)
    change_of(config, module, tensors)
    assert len(calls) == 1


def test_what_peft_draws_at_every_load_is_refused() -> None:
    pissa = LoraConfig(r=8, target_modules=[PATH], init_lora_weights="pissa_niter_1")
    _, module, tensors = made(pissa)
    with pytest.raises(UnsupportedFeatureError, match="random numbers"):
        change_of(pissa, module, tensors)
