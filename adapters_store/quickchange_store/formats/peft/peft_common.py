"""Names of tensors, targets and the base model, common to PEFT's formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, flag, invalid, other_base, texts
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.weight_files import weight_files

WEIGHTS_FILE = "adapter_model.safetensors"
WRITER = "PEFT's save_pretrained"
ALL_LINEAR = "all-linear"
SAVED = "modules_to_save"
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


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the modules that PEFT saves whole. Raises InvalidAdapterError."""
    named = config.get(SAVED) or []
    if not isinstance(named, list) or not all(isinstance(each, str) and each for each in named):
        raise invalid(SAVED, named, "list names of modules")
    texts(SAVED, named)
    return tuple(named)


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
    norms: bool = False,
) -> frozenset[str]:
    """The base's modules that PEFT would wrap, by PEFT's own rule over path or name in the file.

    Those of single experts count too, if the file has them. `defaults` are PEFT's target_modules by
    model type. alone: nothing else is targeted, so there must be some. norms: they may be targets.
    Raises InvalidAdapterError, BaseMismatchError, and UnsupportedFeatureError for a norm.
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
            modules_to_save=saved_names(config),  # which PEFT leaves out of the targets
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
    refused = [path for path in base.modules if path in found and _is_norm(base, path)]
    if refused and not norms:
        raise UnsupportedFeatureError(
            f"{refused[0]} is a norm, on which there is no {config.get('peft_type') or 'LoRA'}",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="train norms whole: name them in modules_to_save, or with LN_TUNING",
        )
    if not found and alone:
        raise BaseMismatchError(
            f"{config.get('target_modules')!r} is no linear or embedding module of the base model "
            f"{base.architecture}",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="use an adapter of this base model; linear modules and the input embedding are "
            "served",
        )
    return with_tied(config, base, by_weight | found)


def with_tied(config: Mapping[str, Any], base: BaseSpec, paths: frozenset[str]) -> frozenset[str]:
    """`paths`, and the modules tied to any of them where the configuration asks for it."""
    if not flag(config, "ensure_weight_tying"):
        return paths
    return paths.union(*(base.tied_to(path) for path in paths))


def _is_norm(base: BaseSpec, path: str) -> bool:
    return base.modules[path].kind == "norm"


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
