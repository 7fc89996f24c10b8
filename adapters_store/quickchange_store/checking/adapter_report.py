"""What would be served of a folder, found as `add` finds it, and what could not be checked.

Without the base model at hand, a plain LoRA is held against itself: its configuration against its
tensors, with a base model that has just the modules that these name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_store.canonical.adapter_bytes import write
from quickchange_store.canonical.canonical_adapter import BaseSpec, ModuleShape
from quickchange_store.checking.trainer_signs import trainer_of
from quickchange_store.errors import BaseMismatchError, BaseModelError, StoreError
from quickchange_store.formats.config_file import BASE_NAME, CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts.adapter_folder import adapter_folder
from quickchange_store.formats.layouts.foreign_layouts import layout_name
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import PREFIX, unwrapped
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.tuners.tuner_reader import is_made_by_peft
from quickchange_store.formats.weight_files import candidates
from quickchange_store.importing import read_adapter
from quickchange_store.info import describe

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.(?!weight$)[^.]+)?(\.weight)?"
)
_NEEDS_BASE = ("modules_to_save", "target_parameters", "trainable_token_indices", "use_dora")
_OF_BASE = "modules, shapes and values that depend on the base model"


@dataclass(frozen=True)
class AdapterRefusal:
    """Why nothing of the folder would be served, and what mends it."""

    problem: str
    file: str | None
    key: str | None
    remedy: str | None

    @classmethod
    def of(cls, error: StoreError) -> AdapterRefusal:
        return cls(error.problem, error.file, error.key, error.remedy)


@dataclass(frozen=True)
class AdapterFigures:
    """Figures of what would be served, as `adapters show` has them."""

    kind: str
    layout: str | None
    modules: int
    targets: tuple[str, ...]
    ranks: tuple[int, ...]
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int
    invocation: tuple[int, ...]  # tokens that activate it; empty: it serves the whole text
    digest: str | None  # None where the base, which is part of it, is not at hand


@dataclass(frozen=True)
class AdapterReport:
    """What a folder is, what of it would be served, what is refused and what was not looked at."""

    folder: str  # the one that holds the adapter
    trainer: str | None
    made_for: str | None  # the base model that the adapter names
    checked_against: str | None
    served: AdapterFigures | None
    refused: AdapterRefusal | None
    warnings: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()


def report_on(directory: Path, model: str | None) -> AdapterReport:
    """The report on `directory` for the base `model`; None: what the adapter names, if at hand.

    Raises BaseModelError where `model` is given and can't be read.
    """
    spec = None if model is None else _spec(model)
    folder, config, trainer = directory, {}, None
    try:
        trainer = trainer_of(directory, {}) if directory.is_dir() else None
        folder = adapter_folder(directory)
        if (folder / CONFIG_FILE).is_file():
            config = read_config(folder)
        trainer = trainer_of(folder, config) or trainer
    except StoreError as error:
        return AdapterReport(str(folder), trainer, None, model, None, AdapterRefusal.of(error))
    made_for = config.get(BASE_NAME) or config.get("model")  # PEFT's, MLX LM's
    made_for = made_for if isinstance(made_for, str) else None
    missing = None
    if spec is None and made_for is not None:
        spec, missing = _named_base(made_for)
    elif spec is None:
        missing = "the adapter names no base model: give it with --base"
    about = str(folder), trainer, made_for, None if spec is None else spec.name
    if spec is not None:
        return _read(about, directory, spec)
    return _without_base(about, folder, config, f"{_OF_BASE}: {missing}")


def _read(
    about: tuple[str, str | None, str | None, str | None], folder: Path, base: BaseSpec
) -> AdapterReport:
    try:
        read = read_adapter(folder, base)
        return AdapterReport(*about, _served(read, base, known=True), None, read.warnings)
    except StoreError as error:
        return AdapterReport(*about, None, AdapterRefusal.of(error))


def _without_base(
    about: tuple[str, str | None, str | None, str | None],
    folder: Path,
    config: Mapping[str, Any],
    missing: str,
) -> AdapterReport:
    """The report where the base model is not at hand."""
    try:
        base = _assumed(folder, config)
        if base is None:
            tool = layout_name(folder)
            own = () if tool is None else (f"its tensors, which are in {tool}'s own layout",)
            return AdapterReport(*about, None, None, (), (missing, *own))
        read = read_adapter(folder, base)
        return AdapterReport(
            *about, _served(read, base, known=False), None, read.warnings, (missing,)
        )
    except (BaseMismatchError, BaseModelError) as error:  # it may be the base that is assumed
        return AdapterReport(*about, None, None, (), (missing, str(error)))
    except StoreError as error:
        return AdapterReport(*about, None, AdapterRefusal.of(error), (), (missing,))


def _spec(model: str) -> BaseSpec:
    from quickchange_store.base_model.base_spec import base_spec  # imports torch: seconds

    return base_spec(model)


def _named_base(name: str) -> tuple[BaseSpec | None, str | None]:
    """The base that an adapter names, from a folder or the hub's cache; or why there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    where = Path(name)
    if not where.is_dir():
        try:
            found = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            found = None
        if not isinstance(found, str):
            return None, f"{name[:200]!r} is no folder and not in the hub's cache: give --base"
        where = Path(found).parent
    try:
        return _spec(str(where)), None
    except BaseModelError as error:
        return None, str(error)


def _assumed(folder: Path, config: Mapping[str, Any]) -> BaseSpec | None:
    """A base model with the modules that a plain LoRA's tensors name; None for other adapters."""
    if not folder.is_dir():
        return BaseSpec("", "", {})  # whose reader says so
    plain = config.get("peft_type") == "LORA" and not is_made_by_peft(config)
    if not plain or any(config.get(field) for field in _NEEDS_BASE):
        return None
    files = candidates(folder, Path(WEIGHTS_FILE).stem)
    if not files:
        return BaseSpec("", "", {})  # whose reader says which file is missing
    tensors = AdapterTensors(*files)
    sizes: dict[tuple[str, str], int] = {}
    embeddings: set[str] = set()
    for key in sorted(tensors.left):
        found = _FACTOR.fullmatch(unwrapped(key))
        if found is None or PREFIX not in found["module"]:
            return None
        module = found["module"].rpartition(PREFIX)[2]
        tensor = tensors.take(key)
        sizes[module, found["part"]] = tensor.shape[-1 if found["part"] == "A" else 0]
        if found["embedding"]:
            embeddings.add(module)
    modules = {
        module: ModuleShape(
            "embedding" if module in embeddings else "linear",
            sizes.get((module, "A"), 0),
            sizes.get((module, "B"), 0),
        )
        for module in dict.fromkeys(module for module, _ in sizes)
    }
    mapping = config.get("auto_mapping")
    architecture = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return BaseSpec(str(architecture or ""), str(config.get(BASE_NAME) or ""), modules)


def _served(read: Imported, base: BaseSpec, *, known: bool) -> AdapterFigures:
    with tempfile.TemporaryFile() as file:
        digest = write(read.adapter, file)
        size = file.tell()
    info = describe(read.adapter, digest, size=size, created=0.0, base=base)
    layout = info.source.get("format")
    return AdapterFigures(
        kind=info.kind,
        layout=layout if isinstance(layout, str) else None,
        modules=info.modules,
        targets=info.targets,
        ranks=info.ranks,
        parameters=info.parameters,
        dtypes=info.dtypes,
        bytes=size,
        invocation=info.invocation,
        digest=digest if known else None,
    )
