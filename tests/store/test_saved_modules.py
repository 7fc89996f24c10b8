"""Modules that an adapter's folder holds whole give, as updates, the logits that PEFT computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from quickchange_store.errors import (
    StoreError,
)
from quickchange_store.formats.rank_limits import RankLimits
from quickchange_store.importing import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(12).reshape(2, 6) * 4 % 53
NORM, HEAD = "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def lora(*saved: str, targets: str | list[str] = "all-linear", **options: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=targets,
        modules_to_save=list(saved) or None,
        **options,
    )


def trained(base: Any, config: PeftConfig, folder: Path) -> torch.Tensor:
    """Save a random adapter to `folder`; returns PEFT's logits of TOKENS."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def loaded(base: Any, folder: Path) -> torch.Tensor:
    """PEFT's logits with the adapter in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits_of(PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def refused(
    kind: type[StoreError], base: Any, folder: Path, limits: RankLimits | None = None
) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base.spec, limits or RankLimits())
    assert type(caught.value) is kind, caught.value
    assert caught.value.remedy
    return caught.value


VARIANTS: dict[str, tuple[str, PeftConfig]] = {
    "norms of llama": ("llama", LNTuningConfig(task_type="CAUSAL_LM")),
    "norms of gemma": (
        "gemma3",
        LNTuningConfig(target_modules=["input_layernorm", "q_norm", "pre_feedforward_layernorm"]),
    ),
    "norms with biases": (
        "gpt_neox",
        LNTuningConfig(target_modules=["input_layernorm", "final_layer_norm"]),
    ),
    "norms of gpt2": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"])),
    "norms of heads": ("qwen3_moe", LNTuningConfig(target_modules=["q_norm", "k_norm", "norm"])),
    "norms and a head": ("llama", LNTuningConfig(modules_to_save=["lm_head"])),
    "linears by LN_TUNING": ("llama", LNTuningConfig(target_modules=["q_proj", "norm"])),
    "a norm": ("llama", lora("norm")),
    "norms of a layer": ("gpt_neox", lora("input_layernorm", targets=["dense"])),
    "a norm's bias, and all biases": (
        "gpt_neox",
        lora("input_layernorm", targets=["dense"], bias="all"),
    ),
    "all biases of norms": ("gpt_neox", lora(targets=["dense"], bias="all")),
    "a head": ("llama", lora("lm_head")),
    "an embedding": ("llama", lora("embed_tokens")),
    "a scaled embedding": ("gemma3", lora("embed_tokens")),
    "both ends": ("llama", lora("embed_tokens", "lm_head")),
    "a tied embedding": ("llama-tied", lora("embed_tokens")),
    "a tied head": ("llama-tied", lora("lm_head")),
    "tied ends apart": ("llama-tied", lora("embed_tokens", "lm_head")),
    "tied ends together": ("llama-tied", lora("embed_tokens", ensure_weight_tying=True)),
    "tied ends by the head": ("llama-tied", lora("lm_head", ensure_weight_tying=True)),
    "tied targets": (
        "llama-tied",
        lora(targets=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "tied targets by the head": (
        "llama-tied",
        lora(targets=["lm_head", "q_proj"], ensure_weight_tying=True),
    ),
    "tied targets with DoRA": (
        "llama-tied",
        lora(targets=["embed_tokens", "q_proj"], ensure_weight_tying=True, use_dora=True),
    ),
    "linears among targets": ("llama", lora("down_proj", "layers.0.self_attn.o_proj")),
    "a part whole": ("llama", lora("layers.1.mlp")),
    "a layer whole": ("llama", lora("layers.1", targets=["q_proj"])),
    "biased linears": ("llama", lora("k_proj")),
    "transposed linears": ("gpt2", lora("c_fc", targets=["c_attn"])),
    "with DoRA": ("llama", lora("norm", "lm_head", use_dora=True)),
    "with trained tokens": ("llama", lora("lm_head", trainable_token_indices=[3, 4])),
    "with IA3": (
        "llama",
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["lm_head", "norm", "layers.0.mlp.up_proj"],
        ),
    ),
    "with VeRA": ("llama", VeraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "with HRA": ("llama", HRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_modules_give_pefts_logits(
    variant: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    family, config = VARIANTS[variant]
    base = bases(family)
    expected = trained(base, copy.deepcopy(config), tmp_path)
    torch.testing.assert_close(loaded(base, tmp_path), expected)  # PEFT loads what it saved
    adapter = read_adapter(tmp_path, base.spec).adapter
    assert not torch.allclose(logits_of(base.model), expected, atol=1e-3)
    got = canonical_logits(base.model, adapter)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
