"""Import of adapter directories: read, check against the base, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.adapterhub.bottleneck import read_adapterhub
from quickchange_store.formats.config_file import CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.ia3 import read_ia3
from quickchange_store.formats.peft.lora import read_peft
from quickchange_store.formats.peft.mlx import is_mlx, read_mlx
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.token_rows import read_tokens
from quickchange_store.formats.tuners.tuner_reader import (
    EXACT_ONLY,
    EXACT_RANK,
    RankLimits,
    is_made_by_peft,
    read_tuner,
)
from quickchange_store.formats.turbo.heads_reader import read_heads
from quickchange_store.index import Version
from quickchange_store.names import check_name
from quickchange_store.store import Store


@dataclass(frozen=True, slots=True)
class Added:
    """A published version, and warnings for its owner."""

    version: Version
    warnings: tuple[str, ...]


def add_adapter(
    store: Store,
    name: str,
    directory: Path,
    base: BaseSpec,
    *,
    approximate_rank: int | None = None,
    exact_rank: int = EXACT_RANK,
) -> Added:
    """Read the adapter in `directory`, check it against `base` and publish it as `name`.

    exact_rank: a module's rank up to which an update is served exactly, where it is not a LoRA's.
    approximate_rank: what can't be served exactly is, by the nearest update of this rank, whose
    error the version's info states; None refuses it. Raises StoreError: every refusal names file,
    key and remedy.
    """
    check_name(name)  # before the work
    limits = RankLimits(exact_rank, approximate_rank)
    imported = read_adapter(directory, base, limits)
    return Added(store.add(name, imported.adapter, base), imported.warnings)


def read_adapter(directory: Path, base: BaseSpec, limits: RankLimits = EXACT_ONLY) -> Imported:
    """Read an adapter of any supported format: updates, Turbo heads or both. Raises StoreError."""
    if not directory.is_dir():
        raise InvalidAdapterError(
            "no such folder", file=str(directory), remedy="give the folder that holds the adapter"
        )
    heads = read_heads(directory, base)
    if heads is None:
        return _read_updates(directory, base, limits)
    if not any((directory / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        source = dict(heads.source)
        turbo = CanonicalAdapter(base.architecture, heads.base_name, {}, source, heads.heads)
        return Imported(turbo, heads.warnings)
    read = _read_updates(directory, base, limits)
    both = replace(
        read.adapter,
        turbo=heads.heads,
        source={**read.adapter.source, "turbo": dict(heads.source)},
    )
    return Imported(both, read.warnings + heads.warnings)


def _read_updates(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:
    if not (directory / CONFIG_FILE).is_file() and (directory / "model.safetensors").is_file():
        raise UnsupportedFeatureError(
            "this is a whole model, not an adapter",
            file="model.safetensors",
            remedy=f"give a folder with {CONFIG_FILE}",
        )
    config = read_config(directory)
    if is_mlx(config):
        return read_mlx(directory, base)
    if "peft_type" not in config and ("config" in config or "model_type" in config):
        return read_adapterhub(directory, base)
    kind = config.get("peft_type")
    reader = None if is_made_by_peft(config) else _READERS.get(str(kind))
    return read_tuner(directory, base, limits) if reader is None else reader(directory, base)


# PEFT's types that have a reader of their own; `read_tuner` reads or refuses the others.
_READERS: Mapping[str, Callable[[Path, BaseSpec], Imported]] = {
    "IA3": read_ia3,
    "LORA": read_peft,
    "TRAINABLE_TOKENS": read_tokens,
}
