"""`adapter_config.json` of a PEFT LoRA: which fields are honoured, harmless or refused.

Every field of PEFT's LoraConfig is in exactly one of the three groups below, and a field that none
of them knows is refused where it is set: nothing is ignored that could change the output. Knows
nothing of tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quickchange_store.canonical import BaseSpec
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.patterns import check_patterns

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 1024**2
ALL_LINEAR = "all-linear"

HONOURED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",  # its base_model_class is compared with the base's architecture
        "base_model_name_or_path",  # a different one warns
        "bias",
        "exclude_modules",
        "init_lora_weights",  # kinds that change the base's weights are refused
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",  # other than a causal language model warns
        "use_rslora",
    }
)

HARMLESS = frozenset(
    {
        "corda_config",  # how a base-changing kind was initialised; that kind itself is refused
        "eva_config",  # how A was initialised
        "fan_in_fan_out",  # of Conv1D only, whose modules are refused; PEFT ignores it elsewhere
        "inference_mode",
        "loftq_config",
        "lora_dropout",  # training only
        "lora_ga_config",
        "megatron_core",  # a module's name, used with megatron_config only
        "peft_version",
        "qalora_group_size",  # used with use_qalora only
        "revision",  # of the base model on the hub
        "runtime_config",
        "velora_config",  # another backward pass, the same forward pass
    }
)

REFUSED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    }
)

# These subtract from the base's weights what they put into the adapter; without that changed base
# the adapter is another function.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")

_REMEDIES = {
    "use_dora": "train without DoRA, or merge it into the base",
    "modules_to_save": "train these modules with LoRA (target_modules) instead",
    "trainable_token_indices": "train the embedding with LoRA (target_modules) instead",
    "target_parameters": "target nn.Linear modules (target_modules) instead",
    "ensure_weight_tying": "target the embedding and the LM head separately",
}


@dataclass(frozen=True)
class LoraSettings:
    """What of the configuration decides the output."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: Literal["none", "all", "lora_only"]
    lora_bias: bool
    targets: frozenset[str]  # module paths of the base
    base_name: str
    source: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of a module, after rank_pattern."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """The factor before B A: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration as a dictionary. Raises InvalidAdapterError."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InvalidAdapterError(
            "the file is missing",
            file=CONFIG_FILE,
            remedy="give the folder that PEFT's save_pretrained wrote",
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapterError(
            f"not a JSON configuration ({error})", file=CONFIG_FILE, remedy="save the adapter again"
        ) from error
    return config


def parse_config(config: Mapping[str, Any], base: BaseSpec) -> tuple[LoraSettings, list[str]]:
    """The settings, and warnings for the adapter's owner.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError, naming the field.
    """
    _check_kind(config)
    _check_refused(config)
    _check_initialisation(config)
    warnings = _check_base(config, base)
    check_patterns(config, base.modules, CONFIG_FILE)
    settings = LoraSettings(
        r=_rank("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        rslora=_flag(config, "use_rslora"),
        rank_pattern=_pattern(config, "rank_pattern", _rank),
        alpha_pattern=_pattern(config, "alpha_pattern", _number),
        bias=_bias(config),
        lora_bias=_flag(config, "lora_bias"),
        targets=_targets(config, base),
        base_name=str(config.get("base_model_name_or_path") or ""),
        source={
            "format": "peft",
            "config": {key: value for key, value in config.items() if _is_set(value)},
        },
    )
    return settings, warnings + _overlaps(settings)


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None and ("config" in config or "model_type" in config):
        raise UnsupportedFeatureError(
            "bottleneck adapters (AdapterHub) are not supported by this version yet",
            file=CONFIG_FILE,
            key="config",
            remedy="use a LoRA adapter",
        )
    if kind is None:
        raise InvalidAdapterError(
            "the field is missing", file=CONFIG_FILE, key="peft_type", remedy='set it to "LORA"'
        )
    if kind != "LORA":
        raise UnsupportedFeatureError(
            f"{kind!r} is not supported", file=CONFIG_FILE, key="peft_type", remedy='use "LORA"'
        )


def _check_refused(config: Mapping[str, Any]) -> None:
    for name in sorted(config):
        if name in HONOURED or name in HARMLESS or not _is_set(config[name]):
            continue
        if name in REFUSED:
            problem, remedy = "this feature is not supported", _REMEDIES.get(name)
        else:
            problem, remedy = "this field is not known, and it may change the output", None
        raise UnsupportedFeatureError(
            problem,
            file=CONFIG_FILE,
            key=name,
            remedy=remedy or "train without it; remove the field only if it had no effect",
        )


def _check_initialisation(config: Mapping[str, Any]) -> None:
    kind = config.get("init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(_BASE_CHANGING):
        raise UnsupportedFeatureError(
            f"{kind!r} changes the base model's weights, so the adapter alone is another function",
            file=CONFIG_FILE,
            key="init_lora_weights",
            remedy="save it with save_pretrained(path_initial_model_for_weight_conversion=…), "
            "which writes a plain LoRA",
        )


def _check_base(config: Mapping[str, Any], base: BaseSpec) -> list[str]:
    mapping = config.get("auto_mapping")
    architecture = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if architecture is not None and architecture != base.architecture:
        raise BaseMismatchError(
            f"the adapter was made for {architecture}, the base model is {base.architecture}",
            file=CONFIG_FILE,
            key="auto_mapping.base_model_class",
            remedy="use an adapter of this base model",
        )
    warnings = []
    name = config.get("base_model_name_or_path")
    if name and _last_part(str(name)) != _last_part(base.name):
        warnings.append(
            f"{CONFIG_FILE}: base_model_name_or_path: made for {name!r}, while the base model is "
            f"{base.name!r}; architecture and shapes fit"
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        warnings.append(
            f"{CONFIG_FILE}: task_type: made for {task!r}, served as a causal language model"
        )
    return warnings


def _targets(config: Mapping[str, Any], base: BaseSpec) -> frozenset[str]:
    """The base's modules that PEFT would wrap, by PEFT's own rule."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        rule = LoraConfig(
            target_modules=_target_modules(config, base),
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


def _target_modules(config: Mapping[str, Any], base: BaseSpec) -> list[str] | str:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets = config.get("target_modules")
    if targets is None:
        targets = DEFAULTS.get(base.model_type)
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


def _bias(config: Mapping[str, Any]) -> Literal["none", "all", "lora_only"]:
    value = config.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        raise _invalid("bias", value, 'use "none", "all" or "lora_only"')
    kind: Literal["none", "all", "lora_only"] = value
    return kind


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _invalid(name, value, "use true or false")


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _invalid(name, value, "a rank is a whole number from 1")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid(name, value, "use a finite number")
    return float(value)


def _pattern(config: Mapping[str, Any], name: str, check: Any) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise _invalid(name, value, "use an object of module patterns and values")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            remedy = f"use a regular expression: {error}"
            raise _invalid(f"{name}.{pattern}", pattern, remedy) from error
    return {pattern: check(f"{name}.{pattern}", entry) for pattern, entry in value.items()}


def _pattern_key(pattern: Mapping[str, Any], module: str) -> str:
    from peft.utils.other import get_pattern_key

    key: str = get_pattern_key(list(pattern), module)
    return key


def _overlaps(settings: LoraSettings) -> list[str]:
    """A warning where alpha_pattern gives a module several values.

    PEFT takes the first match but saves patterns sorted, so the order of training is lost. Ranks
    need no such warning: the tensors have them.
    """
    pattern = settings.alpha_pattern
    for module in sorted(settings.targets):
        fitting = [key for key in pattern if _pattern_key({key: 0}, module) == key]
        if len({pattern[key] for key in fitting}) > 1:
            return [
                f"{CONFIG_FILE}: alpha_pattern: {', '.join(map(repr, fitting))} all match "
                f"{module}; {fitting[0]!r}, the first in the file, is taken, as PEFT does: check "
                "that training did the same"
            ]
    return []


def _is_set(value: Any) -> bool:
    """Whether a field asks for something: null, false, zero and empty values do not."""
    return bool(value)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _invalid(name: str, value: Any, remedy: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"{value!r} is not valid", file=CONFIG_FILE, key=name, remedy=remedy)
