"""`adapter_config.json` of a PEFT LoRA: which fields are honoured, harmless or refused.

Every field of PEFT's LoraConfig is in exactly one of the three groups below; an unknown field is
refused where it is set, as it might change the output. Knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    MAX_NAMES,
    flag,
    invalid,
    is_set,
    number,
    refuse_fields,
)
from quickchange_store.formats.patterns import check_patterns
from quickchange_store.formats.peft.peft_common import check_base, find_parameters, find_targets
from quickchange_store.formats.peft.tensor_names import TensorNames

T = TypeVar("T")

HONOURED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",  # its base_model_class is compared with the base's architecture
        "base_model_name_or_path",  # a different one warns
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",  # kinds that change the base's weights are refused
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "task_type",  # other than a causal language model warns
        "use_dora",
        "use_qalora",
        "use_rslora",
    }
)

HARMLESS = frozenset(
    {
        "corda_config",  # options of a base-changing initialisation, which is refused
        "eva_config",  # initialisation of A
        "fan_in_fan_out",  # how the base stores a weight, which the base itself tells
        "inference_mode",
        "loftq_config",
        "lora_dropout",  # training only
        "lora_ga_config",
        "megatron_core",  # a module's name, used with megatron_config only
        "peft_version",
        "revision",  # the base model's on the hub
        "runtime_config",
        "velora_config",  # another backward pass, the same forward pass
    }
)

# Fields that trainers add to PEFT's; each tells how the training went.
TRAINING_ONLY = frozenset(
    {
        "gradient_checkpointing",
        "lora_dtype",  # ms-swift: A's and B's while training; the tensors have theirs
        "lorap_emb_lr",  # ms-swift's LoRA+
        "lorap_lr_ratio",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "loraplus_weight_decay",
        "merge_weights",  # earlier PEFT: merged while evaluating, the same function
        "use_gradient_checkpointing",
    }
)

REFUSED = frozenset(
    {
        "alora_invocation_tokens",  # read beside it
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "monteclora_config",
        "trainable_token_indices",  # read beside it
        "use_bdlora",
    }
)

MAX_RANK = 1 << 20  # above any module's width

_REMEDIES = {
    "layer_replication": "serve a base whose checkpoint has its layers so often, and set the "
    "field to null",
}

# These subtract from the base's weights what they put into the adapter; without that changed base
# the adapter is another function.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraSettings:
    """Fields of the configuration that decide the output."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: Literal["none", "all", "lora_only"]
    lora_bias: bool
    dora: bool
    pooled: int  # inputs that QALoRA sums up before A; 1: A reads each by itself
    targets: frozenset[str]  # module paths of the base, and names of single experts' modules
    parameters: frozenset[str]  # paths of experts' parameters
    names: TensorNames  # what the patterns may call them
    base_name: str
    source: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of a module, after rank_pattern."""
        return self.rank_of(self.names.of_target(module))

    def scale(self, module: str) -> float:
        """The factor before B A: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        return self.scale_of(self.names.of_target(module))

    def rank_of(self, names: Sequence[str]) -> int:
        """The rank of what the configuration may call by one of `names`."""
        return _matching(self.rank_pattern, names, self.r)

    def scale_of(self, names: Sequence[str]) -> float:
        """The scale of what the configuration may call by one of `names`."""
        alpha = _matching(self.alpha_pattern, names, self.alpha)
        rank = self.rank_of(names)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def parse_config(
    config: Mapping[str, Any], base: BaseSpec, names: TensorNames
) -> tuple[LoraSettings, list[str]]:
    """The settings, and warnings for the adapter's owner.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError, naming the field.
    """
    refuse_fields(
        config, known=HONOURED | HARMLESS | TRAINING_ONLY, refused=REFUSED, remedies=_REMEDIES
    )
    _check_initialisation(config)
    warnings = check_base(config, base)
    check_patterns(config, [*base.modules, *base.experts, *names.of_experts], CONFIG_FILE)
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    parameters = find_parameters(config, base)
    settings = LoraSettings(
        r=rank_of("r", config.get("r", 8)),
        alpha=number("lora_alpha", config.get("lora_alpha", 8)),
        rslora=flag(config, "use_rslora"),
        rank_pattern=_pattern(config, "rank_pattern", rank_of),
        alpha_pattern=_pattern(config, "alpha_pattern", number),
        bias=_bias(config),
        lora_bias=flag(config, "lora_bias"),
        dora=flag(config, "use_dora"),
        pooled=_pooled(config),
        targets=find_targets(config, base, DEFAULTS, names, alone=not parameters),
        parameters=parameters,
        names=names,
        base_name=str(config.get("base_model_name_or_path") or ""),
        source={
            "format": "peft",
            "config": {key: value for key, value in config.items() if is_set(value)},
        },
    )
    if (parameters or names.expert_modules) and (settings.dora or settings.lora_bias):
        raise UnsupportedFeatureError(
            "experts are served with plain LoRA alone",
            file=CONFIG_FILE,
            key="use_dora" if settings.dora else "lora_bias",
            remedy="train without it, or leave the experts out",
        )
    if settings.dora and settings.lora_bias:
        raise invalid("lora_bias", True, "PEFT has no DoRA with a bias of its own: train without")
    if not settings.alpha:
        warnings.append(
            f"{CONFIG_FILE}: lora_alpha: at 0 the adapter changes nothing; verl's model_merger "
            "writes 0 where it does not know it: set it to the training's"
        )
    return settings, warnings + _overlaps(settings)


def _check_initialisation(config: Mapping[str, Any]) -> None:
    kind = config.get("init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(_BASE_CHANGING):
        raise UnsupportedFeatureError(
            f"{kind!r} changes the base model's weights, so the adapter alone is another function",
            file=CONFIG_FILE,
            key="init_lora_weights",
            remedy="save it with save_pretrained(path_initial_model_for_weight_conversion=…), "
            "which writes a plain LoRA; or serve the base that the initialisation left, saved by "
            "save_pretrained, and set init_lora_weights to true",
        )


def _bias(config: Mapping[str, Any]) -> Literal["none", "all", "lora_only"]:
    value = config.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        raise invalid("bias", value, 'use "none", "all" or "lora_only"')
    kind: Literal["none", "all", "lora_only"] = value
    return kind


def _pooled(config: Mapping[str, Any]) -> int:
    if not flag(config, "use_qalora"):
        return 1
    return rank_of("qalora_group_size", config.get("qalora_group_size", 16))


def rank_of(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise invalid(name, value, f"a rank is a whole number from 1 to {MAX_RANK}")
    return value


def _pattern(config: Mapping[str, Any], name: str, check: Any) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise invalid(name, value, "use an object of module patterns and values")
    if len(value) > MAX_NAMES:
        raise invalid(name, f"{len(value)} patterns", f"give at most {MAX_NAMES}")
    for pattern in value:
        try:
            _compiled(pattern)
        except re.error as error:
            remedy = f"use a regular expression: {error}"
            raise invalid(f"{name}.{pattern}", pattern, remedy) from error
    return {pattern: check(f"{name}.{pattern}", entry) for pattern, entry in value.items()}


def _matching(pattern: Mapping[str, T], names: Sequence[str], default: T) -> T:
    """The value of the first key that matches a module's name, as PEFT's get_pattern_key does."""
    for name in names:
        for key, value in pattern.items():
            if _compiled(key).match(name):
                return value
    return default


@lru_cache(2 * MAX_NAMES)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _overlaps(settings: LoraSettings) -> list[str]:
    """A warning where alpha_pattern gives a module several values.

    PEFT takes the first match but saves patterns sorted, so the order of training is lost. Ranks
    need no such warning: the tensors have them.
    """
    pattern = settings.alpha_pattern
    for module in sorted(settings.targets):
        fitting = [key for key in pattern if _compiled(key).match(module)]
        if len({pattern[key] for key in fitting}) > 1:
            return [
                f"{CONFIG_FILE}: alpha_pattern: {', '.join(map(repr, fitting))} all match "
                f"{module}; {fitting[0]!r}, the first in the file, is taken, as PEFT does: check "
                "that training did the same"
            ]
    return []
