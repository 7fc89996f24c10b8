"""Adapters with random weights for a real base, straight into a store or as PEFT folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate

TARGETS = ("q_proj", "v_proj")
STD = 0.25  # of a tiny base, this changes what it says


def random_adapter(base: BaseSpec, seed: int, rank: int = 4) -> CanonicalAdapter:
    """An adapter of all attention's queries and values."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, shape in base.modules.items():
        if path.rsplit(".", 1)[-1] in TARGETS:
            a = torch.randn(rank, shape.in_features, generator=generator) * STD
            b = torch.randn(shape.out_features, rank, generator=generator) * STD
            updates[path] = LowRankUpdate(a, b, 2.0)
    return CanonicalAdapter(base.architecture, base.name, updates)


def write_peft(adapter: CanonicalAdapter, folder: Path) -> Path:
    """The same as a PEFT folder."""
    folder.mkdir(parents=True)
    rank = adapter.max_rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for path, update in adapter.updates.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = update.a
        tensors[f"base_model.model.{path}.lora_B.weight"] = update.b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
