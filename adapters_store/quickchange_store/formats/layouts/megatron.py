"""LoRA in the names of Megatron Core and NeMo, whose linears join several of transformers'.

    linear_qkv   for each group of heads its queries, one key and one value: q_proj, k_proj, v_proj
    linear_fc1   all of gate_proj, then all of up_proj
    linear_proj, linear_fc2   o_proj, down_proj

The parts of a joined linear share its A and have their rows of its B. Names are NeMo 1's
(`self_attention.adapter_layer.lora_kqv_adapter.linear_in`), NeMo 2's and Megatron Bridge's
(`linear_qkv.adapter.linear_in`; of single parts, `linear_qkv.adapter.adapter_q.linear_in`), and
PEFT's on Megatron's modules (`linear_qkv.lora_A`), as Megatron-SWIFT has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts.own_layout import (
    A,
    B,
    Config,
    OpenedLayout,
    lora_config,
    mapped_targets,
)
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.tensors import Named

if TYPE_CHECKING:
    import torch

_KEY = re.compile(
    r"(?:[a-z_]+\.)*layers\.(?P<layer>\d+)\.(?:self_attention|mlp)\."
    r"(?:adapter_layer\.(?P<nemo>lora_\w+_adapter)"
    r"|(?P<linear>linear_\w+)(?:\.(?:adapter|lora)(?:\.?_?adapter_(?P<single>\w+))?)?)"
    r"\.(?P<part>linear_in|linear_out|lora_A|lora_B)(?:\.(?!weight$)[^.]+)?\.weight"
)
_NEMO = {
    "lora_kqv_adapter": "linear_qkv",
    "lora_dense_attention_adapter": "linear_proj",
    "lora_hto4h_adapter": "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
    "lora_unfused_hto4h_adapter": "linear_fc1",
}
_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_SINGLE = {name.partition("_")[0]: name for names in _MODULES.values() for name in names}
_TARGETS = {
    **_MODULES,
    "attention_qkv": _MODULES["linear_qkv"],
    "attention_dense": _MODULES["linear_proj"],
    "mlp_fc1": _MODULES["linear_fc1"],
    "mlp_fc2": _MODULES["linear_fc2"],
    **{f"linear_{name}": (module,) for name, module in _SINGLE.items()},
    "linear_fc1_gate": ("gate_proj",),
    "linear_fc1_up": ("up_proj",),
}
_ATTENTION = ("linear_qkv", "linear_proj")


def knows(key: str) -> bool:
    """True if `key`, without wrappers' parts, is a name of this layout."""
    return _KEY.fullmatch(key) is not None


def read(
    directory: Path,  # noqa: ARG001 - what every layout takes
    files: Sequence[Path],
    config: Config,
    base: BaseSpec,
    names: TensorNames,
) -> Imported:
    """The adapter in `files`. Raises StoreError."""

    def parts(key: str, tensor: torch.Tensor, file: str) -> Named | None:
        found = _KEY.fullmatch(key)
        linear = found and (found["linear"] or _NEMO.get(found["nemo"]))
        if found is None or linear not in _MODULES:
            return None
        block = "self_attn" if linear in _ATTENTION else "mlp"
        modules: Sequence[str] = _MODULES[linear]
        if found["single"]:
            modules = [_SINGLE[found["single"]]] if found["single"] in _SINGLE else []
        where = [names.path(f"layers.{found['layer']}.{block}.{each}") for each in modules]
        paths = [path for path in where if path is not None]
        if not modules or len(paths) < len(modules):
            return None
        if found["part"] in ("linear_in", "lora_A"):
            return [(f"{PREFIX}{path}.{A}", tensor) for path in paths]
        rows = _rows(tensor, (file, key), linear, paths, base)
        return [(f"{PREFIX}{path}.{B}", part) for path, part in zip(paths, rows, strict=True)]

    opened = OpenedLayout.of("megatron", files, base, names, parts)
    peft = lora_config(config, "Megatron", "peft.dim and peft.alpha")
    targets = mapped_targets(peft, _TARGETS, opened.targets)
    return opened.read({**peft, "target_modules": targets})


def _rows(
    tensor: torch.Tensor, place: tuple[str, str], linear: str, paths: Sequence[str], base: BaseSpec
) -> Sequence[torch.Tensor]:
    """The rows of a joined linear's B that belong to each of its parts. Raises StoreError."""
    sizes = [base.modules[path].out_features for path in paths]
    if len(sizes) == 1:
        return [tensor]
    width = base.head_dim or 0
    uneven = linear == "linear_qkv" and (not width or sizes[0] % sizes[1] or sizes[1] % width)
    if tensor.ndim != 2 or tensor.shape[0] != sum(sizes) or uneven:
        raise BaseMismatchError(
            f"shape {list(tensor.shape)}, while {', '.join(paths)} of the base model ask for "
            f"{sum(sizes)} rows, in heads of {width}",
            file=place[0],
            key=place[1],
            remedy="use an adapter of this base model, gathered from all tensor-parallel ranks",
        )
    if linear == "linear_fc1":
        return [tensor[: sizes[0]].contiguous(), tensor[sizes[0] :].contiguous()]
    groups = sizes[1] // width
    heads = tensor.reshape(groups, -1, width, tensor.shape[1])  # [groups, queries + 2, width, r]
    queries = heads.shape[1] - 2
    found = heads[:, :queries], heads[:, queries : queries + 1], heads[:, queries + 1 :]
    return [part.flatten(0, 2).contiguous() for part in found]
