"""Reader of PEFT IA3 directories: one factor for each output, or input, of targeted modules.

A module in `feedforward_modules` has its *input* scaled, which is no change of its output that
could be added. Where another module produces that input factor for factor (down_proj's input is
act(gate) ⊙ up), scaling that module's output is the same, and that is what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec, LowRankUpdate
from quickchange_store.errors import UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    invalid,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.patterns import check_patterns
from quickchange_store.formats.peft.classification_head import take_classifier
from quickchange_store.formats.peft.peft_common import (
    check_base,
    find_targets,
    open_tensors,
)
from quickchange_store.formats.peft.saved_modules import as_configured, with_saved_modules
from quickchange_store.formats.peft.tensor_names import PREFIX
from quickchange_store.formats.rank_limits import Factoring, RankLimits
from quickchange_store.formats.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

HONOURED = frozenset(
    {
        "auto_mapping",  # its base_model_class is compared with the base's architecture
        "base_model_name_or_path",  # a different one warns
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "peft_type",
        "target_modules",
        "task_type",  # other than a causal language model warns
    }
)
HARMLESS = frozenset(
    {
        "fan_in_fan_out",  # how the base stores a weight, which the base itself tells
        "inference_mode",
        "init_ia3_weights",
        "peft_version",
        "revision",  # the base model's on the hub
    }
)


def read_ia3(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:
    """Read the IA3 adapter in `directory` for the base model `base`.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError; the message names
    file, key and remedy.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

    tensors, names = open_tensors(directory, base)
    classified = take_classifier(directory, read_config(directory), base, tensors)
    config = classified.config
    refuse_fields(config, known=HONOURED | HARMLESS, refused=(), remedies={})
    warnings = check_base(config, base)
    check_patterns(config, base.modules, CONFIG_FILE)
    targets = find_targets(config, base, DEFAULTS, names)
    feedforward = _feedforward(config, base, targets)
    gains: dict[str, torch.Tensor] = {}
    for module in (path for path in base.modules if path in targets):
        place = _producer(base, module) if module in feedforward else module
        gain = _factors(tensors, base, module, feedforward=module in feedforward)
        gains[place] = gains[place] * gain if place in gains else gain
    updates = {path: _update(base, path, gain) for path, gain in gains.items()}
    factoring = Factoring(limits)
    updates = with_saved_modules(updates, config, base, tensors, factoring)
    adapter = as_configured(updates, config, base, tensors, factoring)
    return classified.joined(Imported(adapter, tuple(warnings)))


def _feedforward(
    config: Mapping[str, Any], base: BaseSpec, targets: frozenset[str]
) -> frozenset[str]:
    """Targets whose input is scaled, by PEFT's own rule."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as DEFAULTS

    names = config.get("feedforward_modules")
    if names is None:
        names = DEFAULTS.get(base.model_type)
    if isinstance(names, str):
        try:
            return frozenset(path for path in targets if re.fullmatch(names, path))
        except re.error as error:
            raise invalid("feedforward_modules", names, f"correct the expression: {error}") from (
                error
            )
    if not isinstance(names, list | set | tuple) or not all(isinstance(n, str) for n in names):
        raise invalid("feedforward_modules", names, "use a list of names or a regular expression")
    return frozenset(path for path in targets if path.endswith(tuple(names)))


def _producer(base: BaseSpec, module: str) -> str:
    """The module whose output's factors are the factors of this module's input."""
    if module not in base.producers:
        raise UnsupportedFeatureError(
            f"it scales the input of {module}, which no module of {base.architecture} produces "
            "factor for factor",
            file=CONFIG_FILE,
            key="feedforward_modules",
            remedy="train with feedforward_modules=[], which scales outputs, or with LoRA; inputs "
            "are served for the down_proj of gated MLPs",
        )
    return base.producers[module]


def _factors(
    tensors: AdapterTensors, base: BaseSpec, module: str, *, feedforward: bool
) -> torch.Tensor:
    """The module's factors: [out], or [in] of a feed-forward module."""
    shape = base.modules[module]
    if shape.kind != "linear":
        raise UnsupportedFeatureError(
            f"{module} is an embedding, which PEFT's IA3 does not train",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="target linear modules",
        )
    expected = (1, shape.in_features) if feedforward else (shape.out_features, 1)
    return tensors.take_shaped(f"{PREFIX}{module}.ia3_l", module, expected).flatten()


def _update(base: BaseSpec, module: str, gain: torch.Tensor) -> LowRankUpdate:
    shape = base.modules[module]
    a, b = gain.new_zeros(0, shape.in_features), gain.new_zeros(shape.out_features, 0)
    return LowRankUpdate(a, b, 1.0, gain=gain)
