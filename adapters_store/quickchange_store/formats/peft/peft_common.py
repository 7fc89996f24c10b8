"""Names of tensors, targets and the base model, common to PEFT's formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, invalid, other_base, texts
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.weight_files import weight_files

WEIGHTS_FILE = "adapter_model.safetensors"
WRITER = "PEFT's save_pretrained"
ALL_LINEAR = "all-linear"
_FOREIGN = (
    (
        re.compile(r"(^|\.)transformer\.h\.\d+\.(attn|mlp)\.\w+\.lora_[AB]$"),
        "LitGPT",
        "convert it with `litgpt convert_from_litgpt`, then to PEFT's format",
    ),
)


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


def open_tensors(directory: Path, base: BaseSpec) -> tuple[AdapterTensors, TensorNames]:
    """The folder's tensors by PEFT's names for them, and the names. Raises StoreError."""
    names = TensorNames(base)
    paths = weight_files(directory, WEIGHTS_FILE, WRITER)
    tensors = AdapterTensors(*paths, plain=names.plain)
    names.refuse_several(paths[0].name)
    _refuse_foreign(tensors)
    return tensors, names


def _refuse_foreign(tensors: AdapterTensors) -> None:
    """Refuse names of tools that order a weight's rows in another way, or fuse modules."""
    for key in sorted(tensors.left):
        for pattern, tool, how in _FOREIGN:
            if pattern.search(key):
                raise UnsupportedFeatureError(
                    f"this is {tool}'s own name for a tensor, where PEFT's "
                    f"{PREFIX}PATH.lora_A.weight is read",
                    file=WEIGHTS_FILE,
                    key=key,
                    remedy=how,
                )


def find_parameters(config: Mapping[str, Any], base: BaseSpec) -> frozenset[str]:
    """Paths of the parameters that PEFT would wrap: target_parameters.

    Raises InvalidAdapterError and UnsupportedFeatureError.
    """
    field = "target_parameters"
    wanted = config.get(field)
    if not wanted:
        return frozenset()
    if not isinstance(wanted, list) or not all(isinstance(each, str) and each for each in wanted):
        raise invalid(field, wanted, "list names of parameters")
    texts(field, wanted)
    # PEFT lists names that not every model has; a tensor that no entry fits is refused later.
    known = [*base.experts, *_weights(base)]
    found = {path for path in known for each in wanted if f".{path}".endswith(f".{each}")}
    if not found:
        raise UnsupportedFeatureError(
            f"{wanted!r} is no weight of a linear, of experts or of a router of the base model "
            f"{base.architecture} ({', '.join(_endings(known))})",
            file=CONFIG_FILE,
            key=field,
            remedy="target the experts' matrices, their routers, or linear modules",
        )
    return frozenset(found)


def _weights(base: BaseSpec) -> list[str]:
    """Weights [out, in], whose LoRA is the one of their module."""
    return [
        f"{path}.weight"
        for path, shape in base.modules.items()
        if shape.kind in ("linear", "router") and not shape.transposed
    ]


def _endings(paths: Iterable[str]) -> list[str]:
    return sorted({".".join(path.split(".")[-2:]) for path in paths})


def find_targets(
    config: Mapping[str, Any],
    base: BaseSpec,
    defaults: Mapping[str, Any],
    names: TensorNames,
    *,
    alone: bool = True,
) -> frozenset[str]:
    """The base's modules that PEFT would wrap, by PEFT's own rule over path or name in the file.

    Those of single experts count too, if the file has them. `defaults` are PEFT's target_modules by
    model type. alone: nothing else is targeted, so there must be some. Raises InvalidAdapterError
    and BaseMismatchError.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for field in ("exclude_modules", "layers_pattern"):
        texts(field, config.get(field))
    _check_layers(config.get("layers_to_transform"))
    by_weight = frozenset(
        path.removesuffix(".weight")
        for path in find_parameters(config, base)
        if path not in base.experts
    )
    if not alone and not config.get("target_modules"):
        return by_weight
    try:
        rule = LoraConfig(
            target_modules=_target_modules(config, base, defaults, names),
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
        )
        found = {
            path
            for path in (*base.modules, *names.expert_modules)
            if any(check_target_module_exists(rule, name) for name in names.of_module(path))
        }
    except (re.error, ValueError, TypeError) as error:
        raise InvalidAdapterError(
            f"PEFT's rule for these fields fails ({error})",
            file=CONFIG_FILE,
            key="target_modules, exclude_modules, layers_to_transform, layers_pattern",
            remedy="give module names or one regular expression, as PEFT's LoraConfig takes them",
        ) from error
    if not found and alone:
        raise BaseMismatchError(
            f"{config.get('target_modules')!r} is no linear or embedding module of the base model "
            f"{base.architecture}",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="use an adapter of this base model; linear modules and the input embedding are "
            "served",
        )
    return by_weight | found


def _check_layers(layers: Any) -> None:
    listed = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(layer) is int and layer >= 0 for layer in listed):
        raise invalid("layers_to_transform", layers, "list layers by number, from 0")


def _target_modules(
    config: Mapping[str, Any], base: BaseSpec, defaults: Mapping[str, Any], names: TensorNames
) -> list[str] | str:
    targets = config.get("target_modules")
    if targets is None:
        targets = defaults.get(base.model_type)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [
            path
            for path, shape in base.modules.items()
            if shape.kind == "linear" and path != base.output_head
        ] + list(names.expert_modules)
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
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
                key=tensors.name(key),
                remedy="train the module with LoRA; a resized vocabulary, fully trained modules "
                "and biases outside of linear modules are not supported",
            )


def _is_base_parameter(key: str) -> bool:
    return key.startswith(PREFIX) and key.endswith((".weight", ".bias")) and ".lora_" not in key
