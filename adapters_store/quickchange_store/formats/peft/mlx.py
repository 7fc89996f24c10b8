"""Reader of MLX LM's adapters: `adapter_config.json` and `adapters.safetensors`.

MLX computes y + scale · (x A) B with A [in, r] and B [r, out]: PEFT's LoRA with the matrices
transposed and alpha = scale · r. Its DoRA is PEFT's too, with the magnitudes under `m`. The rest of
the configuration are the options of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    invalid,
    number,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.lora import read_lora
from quickchange_store.formats.peft.peft_config import rank_of
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.tensors import AdapterTensors, weights_file

MLX_FILE = "adapters.safetensors"
_KINDS = ("lora", "dora")
_PARTS = {
    "linear": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"},
    "embedding": {
        "lora_a": "lora_embedding_A",
        "lora_b": "lora_embedding_B",
        "m": "lora_magnitude_vector",
    },
}


def is_mlx(config: Mapping[str, Any]) -> bool:
    """True if the configuration is MLX LM's."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def read_mlx(directory: Path, base: BaseSpec) -> Imported:
    """Read the adapter in `directory` for the base model `base`. Raises as `read_peft`."""
    config = read_config(directory)
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise UnsupportedFeatureError(
            f"{kind!r} of MLX is not supported",
            file=CONFIG_FILE,
            key="fine_tune_type",
            remedy="train with --fine-tune-type lora or dora",
        )
    rank, scale = _parameters(config)
    names = TensorNames(base)

    def plain(key: str) -> str | None:
        module, _, part = key.rpartition(".")
        path = names.path(module)
        named = None if path is None else _PARTS[base.modules[path].kind].get(part)
        return None if named is None else f"{PREFIX}{path}.{named}"

    path = weights_file(directory, MLX_FILE, "mlx_lm.lora")
    tensors = AdapterTensors(path, plain=plain, transposed=True)
    targets = [module for module in base.modules if _has_factors(tensors, module)]
    if not targets:
        raise InvalidAdapterError(
            f"no tensor belongs to a module of the base model {base.architecture}",
            file=MLX_FILE,
            key=min(tensors.left, default=None),
            remedy="use an adapter of this base model, whose tensors are PATH.lora_a and .lora_b",
        )
    peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": targets,
        "use_dora": kind == "dora",
    }
    read = read_lora(peft, base, tensors, names)
    kept = {"fine_tune_type": kind, "lora_parameters": config["lora_parameters"]}
    read.adapter.source.update(format="mlx", config=kept)
    return read


def _parameters(config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale."""
    given = config.get("lora_parameters")
    if not isinstance(given, dict):
        raise invalid("lora_parameters", given, "give rank and scale, as mlx_lm.lora writes them")
    refuse_fields(
        given,
        known={"rank", "scale", "dropout", "keys"},  # the last two: of the training alone
        refused={"alpha"},
        remedies={"alpha": "give the scale alone: MLX LM's versions read alpha in two ways"},
        prefix="lora_parameters.",
    )
    rank = rank_of("lora_parameters.rank", given.get("rank"))
    return rank, number("lora_parameters.scale", given.get("scale"))


def _has_factors(tensors: AdapterTensors, module: str) -> bool:
    return any(
        f"{PREFIX}{module}.{part}" in tensors
        for parts in _PARTS.values()
        for part in parts.values()
    )
