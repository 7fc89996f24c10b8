"""Small random base models on disk, PEFT adapters for them, and what PEFT itself answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_inner": 48},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
    # Gate and up take turns; matrices are [in, out].
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
}
TOKENS = torch.arange(12).reshape(2, 6) * 4 % SIZES["vocab_size"]


@dataclass(frozen=True)
class Base:
    """A base model on disk, the same in memory, and its spec."""

    folder: Path
    model: torch.nn.Module
    spec: BaseSpec


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A function that gives the base model of a family, made once."""
    made: dict[str, Base] = {}

    def get(family: str) -> Base:
        if family not in made:
            made[family] = _make_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def _make_base(family: str, folder: Path) -> Base:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {**SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return Base(folder, model, base_spec(folder, name="tiny"))


@dataclass(frozen=True)
class Trained:
    """An adapter as PEFT saved it, and the logits that PEFT computes with it."""

    folder: Path
    logits: torch.Tensor


@pytest.fixture(scope="session")
def train(bases: Callable[[str], Base]) -> Callable[..., Trained]:
    """A function that makes a random PEFT adapter for a family and saves it to a folder."""

    def make(family: str, folder: Path, seed: int = 1, **options: Any) -> Trained:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves embeddings too
            config = LoraConfig(task_type="CAUSAL_LM", **options)
            model = get_peft_model(copy.deepcopy(bases(family).model), config).eval()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
        with torch.inference_mode():
            return Trained(folder, model(input_ids=TOKENS).logits)

    return make


@torch.inference_mode()
def _canonical_logits(model: torch.nn.Module, adapter: CanonicalAdapter) -> torch.Tensor:
    """Logits of the base with y + (gain − 1) ⊙ y + scale · B(A x) + bias at each module.

    The form's definition, for updates that read the module's input with no activation.
    """

    def hook(update: LowRankUpdate) -> Callable[..., torch.Tensor]:
        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            a, b = update.a.float(), update.b.float()
            x = inputs[0]
            inner = a.T[x] if isinstance(module, torch.nn.Embedding) else x @ a.T
            result = output + update.scale * (inner @ b.T)
            if update.gain is not None:
                result = result + (update.gain - 1) * output
            return result if update.bias is None else result + update.bias

        return add

    changed: dict[str, torch.Tensor] = {}
    handles = []
    for path, update in adapter.updates.items():
        parameter, _, expert = path.rpartition(".")
        if not expert.isdecimal():
            handles.append(model.get_submodule(path).register_forward_hook(hook(update)))
            continue
        weight = model.get_parameter(parameter)
        changed.setdefault(parameter, weight.data.clone())
        delta = update.scale * (update.b.float() @ update.a.float())
        transposed = model.get_submodule(parameter.rpartition(".")[0]).is_transposed
        weight.data[int(expert)] += delta.T if transposed else delta
    try:
        return model(input_ids=TOKENS).logits
    finally:
        for parameter, before in changed.items():
            model.get_parameter(parameter).data.copy_(before)
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="session")
def canonical_logits() -> Callable[[torch.nn.Module, CanonicalAdapter], torch.Tensor]:
    return _canonical_logits


@pytest.fixture(scope="session")
def small_adapter() -> Callable[..., CanonicalAdapter]:
    """A function that makes a distinct small adapter from a number, without any model."""

    def make(value: int, size: int = 4) -> CanonicalAdapter:
        a = torch.full((2, size), float(value))
        update = LowRankUpdate(a, torch.ones(3, 2), scale=0.5)
        return CanonicalAdapter("LlamaForCausalLM", "tiny", {"model.layers.0.q_proj": update})

    return make


@pytest.fixture(scope="session")
def turbo_adapter() -> Callable[..., CanonicalAdapter]:
    """A function that makes a distinct Turbo from a number, without any model."""

    def make(
        value: int, hidden: int = 4, architecture: str = "LlamaForCausalLM"
    ) -> CanonicalAdapter:
        blocks = tuple(
            DraftBlock(torch.full((hidden, hidden), float(value + i)), torch.ones(hidden))
            for i in range(2)
        )
        heads = TurboHeads(blocks, ((0,), (1,)))
        return CanonicalAdapter(architecture, "tiny", {}, {}, heads)

    return make
