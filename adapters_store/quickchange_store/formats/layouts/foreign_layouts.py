"""Layouts that are told by the names of their tensors, whatever the folder says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.formats.config_file import CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts import kohya, megatron, torchtune
from quickchange_store.formats.peft.mlx import is_mlx
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import TensorNames, unwrapped
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.tuners.tuner_reader import is_made_by_peft
from quickchange_store.formats.weight_files import candidates

_LAYOUTS = (torchtune, megatron, kohya)


def read_foreign(directory: Path, base: BaseSpec) -> Imported | None:
    """The adapter in `directory` where its tensors are in a layout of another tool; else None.

    Raises StoreError.
    """
    has_config = (directory / CONFIG_FILE).is_file()
    config = read_config(directory) if has_config else {}
    plain = config.get("peft_type") in (None, "LORA") and not is_made_by_peft(config)
    if not plain or is_mlx(config) or "config" in config:
        return None
    files, keys = _files(directory)
    names = TensorNames(base)
    layout = _layout([key for key in keys if names.plain(key) is None])
    if layout is None:
        return None
    read: Imported = layout.read(directory, files, config, base, TensorNames(base))
    return read


def layout_name(directory: Path) -> str | None:
    """The tool in whose layout the tensors in `directory` are; None: PEFT's. Raises StoreError."""
    layout = _layout(_files(directory)[1])
    return None if layout is None else layout.__name__.rpartition(".")[2]


def _files(directory: Path) -> tuple[list[Path], list[str]]:
    """Files of weights, and the names of their tensors."""
    files = candidates(directory, Path(WEIGHTS_FILE).stem)
    return files, sorted(key for path in files for key in AdapterTensors.keys(path))


def _layout(keys: list[str]) -> ModuleType | None:
    """The layout that one of `keys`, which the base's modules do not explain, is of."""
    for layout in _LAYOUTS:
        if any(layout.knows(unwrapped(key)) for key in keys):
            return layout
    return None
