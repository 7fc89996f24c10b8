"""Import of adapter directories: read, check against the base, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.errors import UnsupportedFeatureError
from quickchange_store.formats.adapterhub.bottleneck import read_adapterhub
from quickchange_store.formats.config_file import CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts.adapter_folder import adapter_folder
from quickchange_store.formats.layouts.foreign_layouts import read_foreign
from quickchange_store.formats.peft.ia3 import read_ia3
from quickchange_store.formats.peft.lora import read_peft
from quickchange_store.formats.peft.mlx import is_mlx, read_mlx
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.saved_modules import read_norm_tuning
from quickchange_store.formats.peft.token_rows import read_tokens
from quickchange_store.formats.prompts.prompt_reader import OF_CACHES, OF_EMBEDDINGS, read_prompt
from quickchange_store.formats.rank_limits import EXACT_ONLY, RankLimits
from quickchange_store.formats.tuners.tuner_reader import is_made_by_peft, read_tuner
from quickchange_store.formats.turbo.heads_reader import read_heads
from quickchange_store.formats.vocabulary.resized_vocabulary import with_tokenizer
from quickchange_store.index import Version
from quickchange_store.names import check_name
from quickchange_store.sources.adapter_url import AdapterUrl
from quickchange_store.sources.fetching import fetched
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
    limits: RankLimits = EXACT_ONLY,
    origin: Mapping[str, str] | None = None,
) -> Added:
    """Read the adapter in `directory`, check it against `base` and publish it as `name`.

    limits: how updates that are no LoRA's are served, by their ranks. origin: where the files were
    fetched from, recorded beside their format. Raises StoreError: every refusal names file, key and
    remedy.
    """
    check_name(name)  # before the work
    imported = read_adapter(directory, base, limits)
    adapter = imported.adapter
    if origin is not None:
        adapter = replace(adapter, source={**adapter.source, "from": dict(origin)})
    return Added(store.add(name, adapter, base), imported.warnings)


def add_unless_known(store: Store, name: str, directory: Path, base: BaseSpec) -> Added | None:
    """Publish the adapter in `directory` unless it is a version of `name` already, be it one that
    was rolled back. Raises StoreError."""
    check_name(name)
    imported = read_adapter(directory, base)
    entry = store.snapshot().entries.get(name)
    if entry is not None:
        found = digest(imported.adapter)
        if any(version.digest == found for version in entry.versions.values()):
            return None
    return Added(store.add(name, imported.adapter, base), imported.warnings)


def add_from_url(
    store: Store, name: str, url: AdapterUrl, base: BaseSpec, limits: RankLimits = EXACT_ONLY
) -> Added:
    """Fetch the adapter at a URL and publish it as `name`. Raises StoreError and OSError."""
    check_name(name)
    with fetched(url) as there:
        return add_adapter(store, name, there.folder, base, limits, there.origin)


def read_adapter(directory: Path, base: BaseSpec, limits: RankLimits = EXACT_ONLY) -> Imported:
    """Read an adapter of any supported format: updates, Turbo heads or both. Raises StoreError."""
    directory = adapter_folder(directory)
    return with_tokenizer(_read_adapter(directory, base, limits), directory, base)


def _read_adapter(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:
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
    foreign = read_foreign(directory, base)
    if foreign is not None:
        return foreign
    config = read_config(directory)
    if is_mlx(config):
        return read_mlx(directory, base)
    if "peft_type" not in config and ("config" in config or "model_type" in config):
        return read_adapterhub(directory, base)
    kind = config.get("peft_type")
    reader = None if is_made_by_peft(config) else _READERS.get(str(kind))
    return (reader or read_tuner)(directory, base, limits)


# PEFT's types that have a reader of their own; `read_tuner` reads or refuses the others.
_READERS: Mapping[str, Callable[[Path, BaseSpec, RankLimits], Imported]] = {
    "IA3": read_ia3,
    "LN_TUNING": read_norm_tuning,
    "LORA": read_peft,
    "TRAINABLE_TOKENS": read_tokens,
    **dict.fromkeys((*OF_CACHES, *OF_EMBEDDINGS), read_prompt),
}
