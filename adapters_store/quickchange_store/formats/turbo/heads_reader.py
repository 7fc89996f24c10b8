"""Reader of Turbo heads in any layout: finds the layout and the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import InvalidAdapterError
from quickchange_store.formats.adapterhub import bottleneck
from quickchange_store.formats.config_file import BASE_NAME, other_base, read_config
from quickchange_store.formats.peft import peft_common
from quickchange_store.formats.peft.mlx import MLX_FILE
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.turbo.medusa import HEADS_KEYS, is_vllm, read_medusa
from quickchange_store.formats.turbo.turbo_common import (
    HEADS_CONFIG_FILE,
    HEADS_FILE,
    ImportedHeads,
)
from quickchange_store.formats.turbo.turbo_directory import (
    TURBO_FILE,
    TURBO_KEY,
    read_turbo_directory,
)
from quickchange_store.formats.weight_files import PICKLES, refuse_pickle, shards

_STEM = Path(HEADS_FILE).stem
_OF_OTHERS = {
    peft_common.WEIGHTS_FILE,
    bottleneck.WEIGHTS_FILE,
    MLX_FILE,
}  # weights of an adapter beside the heads
_INDEX = ".safetensors.index.json"


def read_heads(directory: Path, base: BaseSpec) -> ImportedHeads | None:
    """The Turbo heads in `directory` for the base model `base`; None where it has none.

    Raises InvalidAdapterError, UnsupportedFeatureError, BaseMismatchError and BaseModelError; the
    message names file, key and remedy.
    """
    by_name = any((directory / name).exists() for name in (HEADS_FILE, TURBO_FILE))
    by_name = by_name or any((directory / f"{_STEM}{suffix}").exists() for suffix in PICKLES)
    config = _config(directory, required=by_name)
    if not by_name and not _speaks_of_heads(directory, config):
        return None
    if TURBO_KEY in config:
        _refuse_two_kinds(directory, config)
        read = read_turbo_directory(directory, config, base)
    else:
        read = read_medusa(_files(directory), config, base)
    name = config.get(BASE_NAME)
    warnings = other_base(BASE_NAME, name, base, HEADS_CONFIG_FILE)
    return ImportedHeads(read.heads, read.base_name, read.source, tuple(warnings))


def _config(directory: Path, *, required: bool) -> Mapping[str, Any]:
    try:
        return read_config(directory, HEADS_CONFIG_FILE)
    except InvalidAdapterError:
        if required:
            raise
        return {}  # absent or unreadable: no heads


def _speaks_of_heads(directory: Path, config: Mapping[str, Any]) -> bool:
    if TURBO_KEY in config or HEADS_KEYS[0] in config or config.get("model_type") == "medusa":
        return True
    if HEADS_KEYS[1] not in config:  # vLLM's key, which some whole models have too
        return False
    files = [path for path in directory.glob("*.safetensors") if path.name not in _OF_OTHERS]
    return is_vllm({key for path in files for key in AdapterTensors.keys(path)})


def _refuse_two_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    keys = [key for key in HEADS_KEYS if key in config]
    if keys or (directory / HEADS_FILE).exists():
        raise InvalidAdapterError(
            f"the folder has heads in two layouts: {TURBO_KEY} and Medusa's",
            file=HEADS_CONFIG_FILE if keys else HEADS_FILE,
            key=keys[0] if keys else None,
            remedy="keep one of them",
        )


def _files(directory: Path) -> list[Path]:
    """The safetensors files that hold Medusa heads: all but those of an adapter beside them."""
    if (directory / TURBO_FILE).exists():
        raise InvalidAdapterError(
            f"{HEADS_CONFIG_FILE} lacks {TURBO_KEY}, which describes this file",
            file=TURBO_FILE,
            remedy=f"copy the folder again with its own {HEADS_CONFIG_FILE}",
        )
    indexes = sorted(directory.glob(f"*{_INDEX}"))
    indexes = [path for path in indexes if not path.name.startswith("adapter")]
    if indexes:
        return sorted({shard for index in indexes for shard in shards(directory, index)})
    found = sorted(path for path in directory.glob("*.safetensors") if path.name not in _OF_OTHERS)
    if not found:
        refuse_pickle(directory, HEADS_FILE, apart_from=("adapter_model", "training_args"))
        raise InvalidAdapterError(
            "the file is missing",
            file=HEADS_FILE,
            remedy=f"give the folder with the heads' tensors beside its {HEADS_CONFIG_FILE}",
        )
    return found
