"""Reader of MLX LM's adapters: `adapter_config.json` and `adapters.safetensors`.

MLX computes y + scale · (x A) B with A [in, r] and B [r, out]: PEFT's LoRA with the matrices
transposed and alpha = scale · r. Its DoRA is PEFT's too, with the magnitudes under `m`. The experts
of a layer have their matrices in one tensor, which is not transposed. The rest of the configuration
are the options of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from quickchange_store.formats.tensors import AdapterTensors, Named
from quickchange_store.formats.weight_files import weight_files

if TYPE_CHECKING:
    import torch

MLX_FILE = "adapters.safetensors"
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's
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

    def parts(key: str, tensor: torch.Tensor, _file: str) -> Named | None:
        module, _, part = key.rpartition(".")
        path = names.path(module)
        if path is None:
            return _of_experts(names, module, part, tensor)
        named = _PARTS.get(base.modules[path].kind, {}).get(part)
        turned = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        return None if named is None else [(f"{PREFIX}{path}.{named}", turned)]

    paths = weight_files(directory, MLX_FILE, "mlx_lm.lora")
    tensors = AdapterTensors(*paths, parts=parts)
    owners = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors.left}
    targets = [path for path in (*base.modules, *names.expert_modules) if path in owners]
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
    rank = rank_of("lora_parameters.rank", given.get("rank"))
    same = {"alpha"} if given.get("alpha") == rank else set()  # 1 in all versions' readings
    refuse_fields(
        given,
        known={"rank", "scale", "dropout", "keys"} | same,  # dropout and keys: training's
        refused={"alpha"} - same,
        remedies={"alpha": "give the scale alone: MLX LM's versions read alpha in two ways"},
        prefix="lora_parameters.",
    )
    return rank, number("lora_parameters.scale", given.get("scale"))


def _of_experts(names: TensorNames, module: str, part: str, tensor: torch.Tensor) -> Named | None:
    """Tensors of single experts' modules, from those of a layer's: A [E, r, in], B [E, out, r].

    MLX joins them as `switch_mlp.gate_proj`; their own names are those of checkpoints.
    """
    owner, found, projection = module.rpartition(".switch_mlp.")
    if not found or part not in ("lora_a", "lora_b") or tensor.ndim != 3:
        return None
    named = _PARTS["linear"][part]
    for name in (projection, _NUMBERED.get(projection, projection)):
        keys = [names.plain(f"{owner}.experts.{e}.{name}.{named}") for e in range(len(tensor))]
        if all(keys):
            return [(str(k), each.contiguous()) for k, each in zip(keys, tensor, strict=True)]
    return None
