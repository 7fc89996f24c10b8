"""Weighted mixes of adapters of every kind are the canonical form's formula, beside plain rows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import VOCABULARY, greedy, make_model, save_model
from torch.nn import functional as F

from quickchange_store.base_model.sublayers import sublayers
from quickchange_store.canonical.canonical_adapter import (
    Activation,
    CanonicalAdapter,
    LowRankUpdate,
    Source,
)

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
MIXES: dict[str, dict[str, float]] = {
    "one": {"houlsby": 0.7},
    "pfeiffer and houlsby": {"pfeiffer": 0.5, "houlsby": -0.8},
    "parallel and lora": {"parallel": 1.2, "lora": 0.6},
    "gains": {"ia3": 0.5, "dora": 0.4, "lora": -0.3},
    "everything": {
        "lora": 0.5,
        "ia3": 0.3,
        "dora": -0.4,
        "houlsby": 0.6,
        "pfeiffer": 0.7,
        "parallel": 0.2,
        "every activation": 1.0,
    },
    "lora": {"lora": 1.0},
    "plain": {},
}


def random_adapter(
    base: torch.nn.Module,
    modules: tuple[str, ...],
    rank: int,
    *,
    activations: tuple[Activation, ...] = ("identity",),
    source: Source = "input",
    gain: bool = False,
) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    updates = {}
    for path, module in base.named_modules():
        if not path.endswith(modules):
            continue
        weight = module.weight
        out, features = weight.shape
        features = features if source == "input" else out
        activation = activations[len(updates) % len(activations)]
        updates[path] = LowRankUpdate(
            normal(rank, features),
            normal(out, rank),
            0.5,
            bias=normal(out),
            activation=activation,
            source=source,
            shift=None if activation == "identity" else normal(rank),
            gain=1 + normal(out) if gain else None,
        )
    return CanonicalAdapter("Tiny", "tiny", updates)


def make_adapters(base: torch.nn.Module) -> dict[str, CanonicalAdapter]:
    ends = ("o_proj", "down_proj")
    return {
        "lora": random_adapter(base, ("q_proj", "v_proj", "o_proj", "up_proj"), 6),
        "ia3": random_adapter(base, ("k_proj", "v_proj", "up_proj"), 0, gain=True),
        "dora": random_adapter(base, ("q_proj", "k_proj", "down_proj"), 9, gain=True),
        "houlsby": random_adapter(base, ends, 11, activations=("silu",), source="output"),
        "pfeiffer": random_adapter(base, ("down_proj",), 5, activations=("relu",), source="stream"),
        "parallel": random_adapter(base, ends, 17, activations=("relu",), source="residual"),
        "every activation": random_adapter(
            base,
            ends,
            8,
            activations=("gelu", "gelu_tanh", "tanh", "silu", "relu"),
            source="output",
        ),
    }


def apply(model: torch.nn.Module, mix: Mapping[str, tuple[CanonicalAdapter, float]]) -> None:
    """Hooks that compute the canonical form's definition on transformers' own model."""
    entered: dict[str, torch.Tensor] = {}
    for path, place in sublayers(model).items():
        assert place.norm is not None

        def keep(_module: object, args: tuple[torch.Tensor], path: str = path) -> None:
            entered[path] = args[0]

        model.get_submodule(place.norm).register_forward_pre_hook(keep)
    for path in {path for adapter, _ in mix.values() for path in adapter.updates}:
        updates = [(a.updates[path], w) for a, w in mix.values() if path in a.updates]

        def add(
            _module: object,
            args: tuple[torch.Tensor],
            y: torch.Tensor,
            path: str = path,
            updates: list[tuple[LowRankUpdate, float]] = updates,
        ) -> torch.Tensor:
            for behind in (False, True):  # what reads the input, then what reads the result of it
                before = y
                residual = entered.get(path, before)
                inputs = {
                    "input": args[0],
                    "output": before,
                    "residual": residual,
                    "stream": before + residual,
                }
                for update, weight in updates:
                    if (update.source != "input") == behind:
                        y = y + weight * delta(update, inputs[update.source], before)
            return y

        model.get_submodule(path).register_forward_hook(add)


def delta(update: LowRankUpdate, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = x @ update.a.T + (0 if update.shift is None else update.shift)
    result = update.scale * ACTIVATIONS[update.activation](h) @ update.b.T
    result = result + (0 if update.bias is None else update.bias)
    return result if update.gain is None else result + (update.gain - 1) * y


# StableLM has other norms and so no fused layers: the residual stream is seen in another way
@pytest.mark.parametrize("family", ["llama", "qwen2", "stablelm"])
def test_mixes_of_all_kinds_in_one_batch_are_the_sum(family: str, tmp_path: Path) -> None:
    path = save_model(family, tmp_path)
    adapters = make_adapters(make_model(family))
    engine = make_engine(path, adapters.__getitem__, max_sequences=10)
    generator = random.Random(3)
    prompts = {
        name: [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 30))]
        for name in MIXES
    }
    drive = Driver(engine)
    for name, mix in MIXES.items():
        engine.submit(request(name, prompts[name], list(mix.items())))
    drive.finish(*MIXES)
    engine.close()
    for name, mix in MIXES.items():
        model = make_model(family)
        apply(model, {key: (adapters[key], weight) for key, weight in mix.items()})
        assert drive.tokens[name] == greedy(model, prompts[name], 10), name
        plain = greedy(make_model(family), prompts[name], 10)
        assert (drive.tokens[name] == plain) == (name == "plain"), name
