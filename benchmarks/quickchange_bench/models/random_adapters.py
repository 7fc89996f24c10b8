"""PEFT LoRA folders with random weights, for load tests with many adapters."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

RANKS_PER_PAGE = 8  # the device tier pads each update to whole pages
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_STD = 0.015  # answers differ from the base model's and are still text


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Shape of each adapter."""

    rank: int = 16
    targets: tuple[str, ...] = PROJECTIONS
    seed: int = 0


def linear_shapes(base: Path, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(in, out) of the base model's linears whose last name is among `targets`, by module path.

    Raises:
        ValueError: the model has none of them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }
    if not shapes:
        raise ValueError(f"{base}: no linear is named any of {', '.join(targets)}")
    return shapes


def device_bytes(shapes: dict[str, tuple[int, int]], rank: int, value_bytes: int) -> int:
    """Bytes of one adapter on the device, ranks padded to whole pages."""
    padded = math.ceil(rank / RANKS_PER_PAGE) * RANKS_PER_PAGE
    return sum(padded * (width_in + width_out) for width_in, width_out in shapes.values()) * (
        value_bytes
    )


def write_in_this_process(
    base: Path, folder: Path, names: list[str], spec: AdapterSpec
) -> dict[str, tuple[int, int]]:
    """Write adapters as `write_adapters` does, but with torch in this process."""
    import torch
    from safetensors.torch import save_file

    shapes = linear_shapes(base, spec.targets)
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(torch.bfloat16)

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": spec.rank,
        "lora_alpha": 2 * spec.rank,
        "target_modules": list(spec.targets),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    for name in names:
        tensors = {}
        for path, (width_in, width_out) in shapes.items():
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = normal(spec.rank, width_in, width_in**-0.5)
            tensors[f"{key}.lora_B.weight"] = normal(width_out, spec.rank, B_STD)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return shapes


def write_adapters(
    base: Path, folder: Path, names: list[str], spec: AdapterSpec
) -> dict[str, tuple[int, int]]:
    """Write bf16 adapters `folder/NAME` for the model in `base`; returns the updated shapes.

    In a process of its own, so that the load generator stays small.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(write_in_this_process, base, folder, names, spec).result()
