"""Reading of a LoRA whose tensors a trainer names in its own way.

A layout says what each tensor becomes under PEFT's names; the rest is PEFT's LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.lora import read_lora
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames, unwrapped
from quickchange_store.formats.tensors import AdapterTensors, Named

if TYPE_CHECKING:
    import torch

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Parts = Callable[[str, "torch.Tensor", str], Named | None]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class OpenedLayout:
    """A folder's tensors under PEFT's names, where a layout knows them."""

    tool: str
    base: BaseSpec
    names: TensorNames
    tensors: AdapterTensors

    @classmethod
    def of(
        cls, tool: str, files: Sequence[Path], base: BaseSpec, names: TensorNames, parts: Parts
    ) -> OpenedLayout:
        """Open `files`. `parts`: what a tensor becomes, by its name without wrappers' parts, and
        its file.

        Raises StoreError where a tensor is none of the layout's or of another base model.
        """
        tensors = AdapterTensors(*files, parts=lambda own, *rest: parts(unwrapped(own), *rest))
        opened = cls(tool, base, names, tensors)
        strange = [key for key in tensors.left if not key.startswith(PREFIX)]
        if strange:
            key = min(strange)
            more = f" ({len(strange) - 1} more like it)" if len(strange) > 1 else ""
            raise BaseMismatchError(
                f"in {tool}'s names this is no LoRA of a module that the base model "
                f"{base.architecture} has{more}",
                file=tensors.file_of(key),
                key=key,
                remedy="use an adapter of this base model, or save it in PEFT's format",
            )
        return opened

    @property
    def targets(self) -> list[str]:
        """Modules of the base, and of its single experts, that have tensors."""
        found = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in self.tensors.left}
        return sorted(found)

    def read(self, config: Config) -> Imported:
        """The adapter by a configuration in PEFT's terms. Raises StoreError."""
        imported = read_lora(config, self.base, self.tensors, self.names)
        imported.adapter.source["format"] = self.tool
        return imported


def lora_config(config: Config, tool: str, terms: str) -> dict[str, Any]:
    """The folder's own configuration, which must say rank and alpha. Raises StoreError.

    `terms`: what the tool calls the two.
    """
    if "r" in config and "lora_alpha" in config:
        return {"peft_type": "LORA", **config}
    missing = "lora_alpha" if "r" in config else "r"
    raise InvalidAdapterError(
        f"the tensors are in {tool}'s own layout, which does not say the scale of the updates",
        file=CONFIG_FILE,
        key=missing,
        remedy=f"write {CONFIG_FILE} beside them, with the training's {terms}: "
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16}',
    )


def mapped_targets(config: Config, known: Mapping[str, Sequence[str]], found: list[str]) -> Any:
    """The modules that a configuration in a tool's terms targets, in the base's terms.

    What has tensors, where it says nothing or has other terms.
    """
    named = config.get("target_modules")
    if not isinstance(named, list) or not named or not all(each in known for each in named):
        return found
    return sorted({module for each in named for module in known[each]})
