"""Names of tensors, targets and the base model, common to PEFT's formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, other_base
from quickchange_store.formats.tensors import AdapterTensors

WEIGHTS_FILE = "adapter_model.safetensors"
WRITER = "PEFT's save_pretrained"
PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"


def check_base(config: Mapping[str, Any], base: BaseSpec) -> list[str]:
    mapping = config.get("auto_mapping")
    architecture = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if architecture is not None and architecture != base.architecture:
        raise BaseMismatchError(
            f"the adapter was made for {architecture}, the base model is {base.architecture}",
            file=CONFIG_FILE,
            key="auto_mapping.base_model_class",
            remedy="use an adapter of this base model",
        )
    field = "base_model_name_or_path"
    warnings = other_base(field, config.get(field), base)
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        warnings.append(
            f"{CONFIG_FILE}: task_type: made for {task!r}, served as a causal language model"
        )
    return warnings


def find_targets(
    config: Mapping[str, Any], base: BaseSpec, defaults: Mapping[str, Any]
) -> frozenset[str]:
    """The base's modules that PEFT would wrap, by PEFT's own rule.

    `defaults` are PEFT's target_modules by model type. Raises InvalidAdapterError and
    BaseMismatchError.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        rule = LoraConfig(
            target_modules=_target_modules(config, base, defaults),
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
        )
        found = {path for path in base.modules if check_target_module_exists(rule, path)}
    except (re.error, ValueError, TypeError) as error:
        raise InvalidAdapterError(
            f"PEFT's rule for these fields fails ({error})",
            file=CONFIG_FILE,
            key="target_modules, exclude_modules, layers_to_transform, layers_pattern",
            remedy="give module names or one regular expression, as PEFT's LoraConfig takes them",
        ) from error
    if not found:
        raise BaseMismatchError(
            f"{config.get('target_modules')!r} is no linear or embedding module of the base model "
            f"{base.architecture}",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="use an adapter of this base model; linear modules and the input embedding are "
            "served",
        )
    return frozenset(found)


def _target_modules(
    config: Mapping[str, Any], base: BaseSpec, defaults: Mapping[str, Any]
) -> list[str] | str:
    targets = config.get("target_modules")
    if targets is None:
        targets = defaults.get(base.model_type)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [
            path
            for path, shape in base.modules.items()
            if shape.kind == "linear" and path != base.output_head
        ]
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, list | set | tuple) or not all(isinstance(t, str) for t in targets):
        raise InvalidAdapterError(
            f"{targets!r} is neither a list of names nor a regular expression",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="list the modules that the adapter's tensors belong to",
        )
    return list(targets)


def check_copies(tensors: AdapterTensors, base: BaseSpec) -> None:
    """Accept copies of the base's own parameters where nothing in them has changed.

    PEFT saves the embedding beside its LoRA, and with bias="all" every bias of the model.
    """
    copies = [key for key in sorted(tensors.left) if _is_base_parameter(key)]
    for key in copies:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name.rpartition(".")[0] not in base.modules and not name.endswith(".bias"):
            continue  # a module that the base lacks: reported with the leftovers
        saved = tensors.take(key)
        original = tensors.base_tensor(base, name, key)
        if saved.shape != original.shape or not bool((original.to(saved.dtype) == saved).all()):
            raise UnsupportedFeatureError(
                f"it replaces the base model's own {name}, shape {list(original.shape)}, by other "
                f"values, shape {list(saved.shape)}",
                file=WEIGHTS_FILE,
                key=key,
                remedy="train the module with LoRA; a resized vocabulary, fully trained modules "
                "and biases outside of linear modules are not supported",
            )


def _is_base_parameter(key: str) -> bool:
    return key.startswith(PREFIX) and key.endswith((".weight", ".bias")) and ".lora_" not in key
