"""Which trainer wrote a folder, by what it leaves beside the adapter: for people alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_store.json_files import UnreadableFileError, read_file

MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class _Signs:
    """A file's name, or a tag in the model card, that one trainer alone writes."""

    trainer: str
    files: str = "$^"
    tag: str | None = None


_SIGNS = (  # those that build on others first
    _Signs("Unsloth", tag="unsloth"),
    _Signs("Axolotl", r"axolotl.*\.ya?ml", "axolotl"),
    _Signs("LLaMA-Factory", r"llamaboard_config\.yaml|trainer_log\.jsonl", "llama-factory"),
    _Signs("ms-swift", r"additional_config\.json|sft_args\.json"),
    _Signs("verl", r"lora_train_meta\.json|fsdp_config\.json|model_world_size_\d+_rank_\d+\.pt"),
    _Signs("torchtune", r"adapter_\d+\.pt|recipe_state\.pt|adapter_model\.pt"),
    _Signs("NeMo", r".*\.nemo|automodel_peft_config\.json"),
    _Signs("mistral-finetune", r"params\.json"),
    _Signs("MLX LM", r"(\d+_)?adapters\.(safetensors|npz)"),
    _Signs("LitGPT", r"lit_model\.pth.*"),
    _Signs("AdapterHub", r"pytorch_adapter\.bin|adapter\.safetensors|head_config\.json"),
    _Signs("TRL", tag="trl"),
    _Signs("DeepSpeed", r"zero_to_fp32\.py|.*optim_states\.pt"),
    _Signs("transformers' Trainer", r"trainer_state\.json|training_args\.bin"),
)


def trainer_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The trainer that wrote `folder`; None where nothing tells it."""
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
        return "Unsloth"
    names = [path.name for path in folder.iterdir()]
    card = _card(folder)
    for signs in _SIGNS:
        tagged = signs.tag is not None and re.search(rf"^- {signs.tag}\s*$", card, re.MULTILINE)
        if tagged or any(re.fullmatch(signs.files, name) for name in names):
            return signs.trainer
    return "PEFT" if "peft_type" in config else None


def _card(folder: Path) -> str:
    """The head of the model card, where trainers name themselves as tags."""
    try:
        text = read_file(folder / "README.md", MAX_CARD_BYTES).decode(errors="replace")
    except UnreadableFileError:
        return ""
    return text.split("\n---", 1)[0] if text.startswith("---") else ""
