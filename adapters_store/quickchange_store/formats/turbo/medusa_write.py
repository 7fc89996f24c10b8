"""Writer of Turbo heads as LoRAX's and vLLM's Medusa folders.

Both hold parallel heads of equally many blocks. LoRAX's v2 is for heads on the base model's LM
head, its v1 for heads with their own. vLLM's always holds LM heads: for shared ones the base
model's is read and copied once (`original_lm_head`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.turbo_part import TurboHeads
from quickchange_store.errors import BaseMismatchError, BaseModelError, UnsupportedFeatureError
from quickchange_store.formats.config_file import BASE_NAME
from quickchange_store.formats.tensors import copied, save_tensors
from quickchange_store.formats.turbo.turbo_common import HEADS_CONFIG_FILE, HEADS_FILE, LmHead

if TYPE_CHECKING:
    import torch

VLLM_FILE = "model.safetensors"


def check_lorax(heads: TurboHeads, base: BaseSpec) -> None:
    """Raise UnsupportedFeatureError for what LoRAX's layouts can't say, BaseMismatchError."""
    _check_medusa(heads, base, "LoRAX")
    if heads.vocabulary is not None:
        raise _unsaid("a draft vocabulary", "LoRAX", "use --format vllm or --format turbo")
    if not heads.outputs and len(heads.heads[0]) > 1:
        remedy = "use --format vllm or --format turbo"
        raise _unsaid("several blocks a head with a shared LM head", "LoRAX", remedy)


def check_vllm(heads: TurboHeads, base: BaseSpec) -> None:
    """Raise UnsupportedFeatureError for what vLLM's layout can't say, BaseMismatchError.

    BaseModelError where the heads share the base's LM head and its weights aren't at hand.
    """
    _check_medusa(heads, base, "vLLM")
    if not heads.outputs and base.weights is None:
        raise BaseModelError(
            "vLLM's layout holds the LM head, and the base model's weights aren't at hand",
            key="lm_heads.0.weight",
            remedy="export where the base model's safetensors weights are",
        )


def write_lorax(heads: TurboHeads, directory: Path, base_name: str) -> None:
    """Write LoRAX's v2, or v1 for heads with LM heads of their own; `directory` exists."""
    layers = len(heads.heads[0])
    tensors = _blocks(heads, "{head}.{layer}.linear")
    for i, output in enumerate(heads.outputs):
        tensors[f"{i}.{layers}.weight"] = copied(output)
    config = {
        BASE_NAME: base_name,
        "medusa_num_heads": heads.depth,
        "medusa_num_layers": layers,
        "version": 1 if heads.outputs else 2,
    }
    _save(directory, HEADS_FILE, tensors, config)


def write_vllm(heads: TurboHeads, directory: Path, base: BaseSpec, base_name: str) -> None:
    """Write vLLM's Medusa layout; `directory` exists. Raises BaseModelError."""
    lm_head = LmHead.of(base)
    tensors = _blocks(heads, "blocks.{head}.layers.{layer}")
    rows = None if heads.vocabulary is None else heads.vocabulary.long()
    if rows is not None:
        tensors["token_map"] = copied(rows)
    for i, output in enumerate(heads.outputs):
        tensors[f"lm_heads.{i}.weight"] = copied(output)
    if not heads.outputs and base.weights is not None:
        weight = base.weights.tensor(f"{lm_head.module}.weight")
        tensors["lm_heads.0.weight"] = copied(weight if rows is None else weight[rows])
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        BASE_NAME: base_name,
        "hidden_size": lm_head.hidden,
        "vocab_size": lm_head.vocabulary,
        "truncated_vocab_size": lm_head.vocabulary if rows is None else len(rows),
        "num_heads": heads.depth,
        "num_hidden_layers": len(heads.heads[0]),
        "medusa_fc_bias": True,
        "original_lm_head": not heads.outputs,
        "torch_dtype": str(heads.blocks[0].weight.dtype).removeprefix("torch."),
    }
    _save(directory, VLLM_FILE, tensors, config)


def check_base(heads: TurboHeads, base: BaseSpec) -> None:
    """Raise BaseMismatchError where the heads are not for this base's hidden size."""
    hidden = LmHead.of(base).hidden
    if heads.hidden != hidden:
        raise BaseMismatchError(
            f"the heads have a hidden size of {heads.hidden}, and the base model has {hidden}",
            key="turbo",
            remedy="give the base model that the heads were made for (--model)",
        )


def _check_medusa(heads: TurboHeads, base: BaseSpec, target: str) -> None:
    check_base(heads, base)
    if heads.sequential:
        raise _unsaid("sequential heads", target)
    if heads.tenant is not None:
        raise _unsaid(f"that they draft for the tenant {heads.tenant} alone", target)
    if len({len(head) for head in heads.heads}) > 1:
        raise _unsaid("heads of different numbers of blocks", target)


def _unsaid(what: str, target: str, remedy: str = "use --format turbo") -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{target}'s layout can't say {what}", key="turbo", remedy=remedy
    )


def _blocks(heads: TurboHeads, pattern: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for i, head in enumerate(heads.heads):
        for j, index in enumerate(head):
            prefix, block = pattern.format(head=i, layer=j), heads.blocks[index]
            tensors[f"{prefix}.weight"] = copied(block.weight)
            tensors[f"{prefix}.bias"] = copied(block.bias)
    return tensors


def _save(
    directory: Path, file: str, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    save_tensors(tensors, directory / file)
    encoded = json.dumps(config, indent=2, sort_keys=True)
    (directory / HEADS_CONFIG_FILE).write_text(encoded + "\n")
