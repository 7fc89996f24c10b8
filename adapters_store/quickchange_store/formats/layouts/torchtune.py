"""LoRA in torchtune's own names, and in Meta's, which mistral-finetune has.

torchtune: `layers.0.attn.q_proj.lora_a.weight`, `mlp.w1`, `output`, DoRA's `magnitude`.
Meta: `layers.0.attention.wq.lora_A.weight`, `feed_forward.w1`.

Both rotate pairs of neighbouring rows in each head of q and k, where transformers rotates the two
halves, so rows of B (and magnitudes) of these are in another order. torchtune follows transformers
for Qwen. Rank and alpha stand in adapter_config.json, or in mistral-finetune's params.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, UnsupportedFeatureError
from quickchange_store.formats.config_file import invalid, number, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts.own_layout import (
    MAGNITUDE,
    A,
    B,
    Config,
    OpenedLayout,
    lora_config,
    mapped_targets,
)
from quickchange_store.formats.peft.peft_config import rank_of
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.tensors import Named

if TYPE_CHECKING:
    import torch

MISTRAL_FILE, PARAMS_FILE = "lora.safetensors", "params.json"  # mistral-finetune's
PAIRED = frozenset({"llama", "mistral", "gemma", "gemma2"})  # neighbours rotate together
HALVED = frozenset({"qwen2", "qwen3"})
_KEY = re.compile(
    r"(?:(?:decoder|model)\.)*(?:layers\.(?P<layer>\d+)\."
    r"(?P<block>attn|attention|mlp|feed_forward)\.)?(?P<module>\w+)\."
    r"(?:(?P<part>lora_[abAB])(?:\.weight)?|(?P<magnitude>magnitude))"
)
_MODULES = {
    **{("attn", name): name for name in ("q_proj", "k_proj", "v_proj")},
    ("attn", "output_proj"): "o_proj",
    **{("attention", f"w{name}"): f"{name}_proj" for name in "qkvo"},
    **{
        (block, number): name
        for block in ("mlp", "feed_forward")
        for number, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    },
}
_TARGETS = {name: [theirs] for (_, name), theirs in _MODULES.items()}
_PARTS = {"lora_a": A, "lora_b": B, None: MAGNITUDE}


def knows(key: str) -> bool:
    """True if `key`, without wrappers' parts, is a name of this layout."""
    found = _KEY.fullmatch(key)
    if found is None:
        return False
    if found["block"] is None:
        return found["module"] == "output"
    return (found["block"], found["module"]) in _MODULES


def read(
    directory: Path, files: Sequence[Path], config: Config, base: BaseSpec, names: TensorNames
) -> Imported:
    """The adapter in `files`. Raises StoreError."""

    def parts(key: str, tensor: torch.Tensor, file: str) -> Named | None:
        found = _KEY.fullmatch(key)
        if found is None or not knows(key):
            return None
        if found["block"] is None:
            path = base.output_head
        else:
            block = "self_attn" if found["block"].startswith("att") else "mlp"
            module = _MODULES[found["block"], found["module"]]
            path = names.path(f"layers.{found['layer']}.{block}.{module}")
        if path is None:
            return None
        part = _PARTS[found["part"] and found["part"].lower()]
        if part != A and path.endswith((".q_proj", ".k_proj")):
            tensor = _halves(tensor, (file, key), base, meta=found["block"] == "attention")
        return [(f"{PREFIX}{path}.{part}", tensor)]

    opened = OpenedLayout.of("torchtune", files, base, names, parts)
    peft = _config(directory, config)
    targets = mapped_targets(peft, _TARGETS | {"output": [base.output_head or ""]}, opened.targets)
    dora = any(key.endswith(MAGNITUDE) for key in opened.tensors.left)
    return opened.read({**peft, "target_modules": targets, "use_dora": dora})


def _halves(
    tensor: torch.Tensor, place: tuple[str, str], base: BaseSpec, *, meta: bool
) -> torch.Tensor:
    """Rows of q's or k's B or magnitude in transformers' order. Raises StoreError."""
    if not meta and base.model_type in HALVED:
        return tensor
    if base.model_type not in PAIRED:
        raise UnsupportedFeatureError(
            f"which rows torchtune rotates together in a model of type {base.model_type!r} is not "
            "known",
            file=place[0],
            key=place[1],
            remedy="save it in PEFT's format (torchtune's FullModelHFCheckpointer writes it)",
        )
    width = base.head_dim
    if width is None or width % 2 or not tensor.ndim or tensor.shape[0] % width:
        raise BaseMismatchError(
            f"shape {list(tensor.shape)} is no number of heads of {width} rows",
            file=place[0],
            key=place[1],
            remedy="use an adapter of this base model",
        )
    pairs = tensor.reshape(-1, width // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _config(directory: Path, config: Config) -> Config:
    if not config and (directory / PARAMS_FILE).is_file():
        lora = read_config(directory, PARAMS_FILE).get("lora")
        if not isinstance(lora, dict):
            raise invalid("lora", lora, "give the file that mistral-finetune wrote", PARAMS_FILE)
        rank = rank_of("lora.rank", lora.get("rank"))
        scale = number("lora.scaling", lora.get("scaling"))
        return {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}
    return lora_config(config, "torchtune", "lora_rank and lora_alpha")
