"""Reader of PEFT's tuners beside plain LoRA and IA3, as low-rank updates.

PEFT's own layers say what an adapter adds (`bare_model`); its factors are exact where the rank is
low, and on request the nearest of a given rank (`low_rank`), with the error stated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    invalid,
    is_set,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.patterns import check_patterns
from quickchange_store.formats.peft.classification_head import take_classifier
from quickchange_store.formats.peft.peft_common import (
    WEIGHTS_FILE,
    WRITER,
    check_base,
    find_targets,
)
from quickchange_store.formats.peft.peft_config import TRAINING_ONLY
from quickchange_store.formats.peft.saved_modules import with_saved_modules
from quickchange_store.formats.peft.tensor_names import (
    PREFIX,
    WRAPPERS,
    TensorNames,
    without_saving,
)
from quickchange_store.formats.rank_limits import Factoring, RankLimits
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.tuners.bare_model import BareModule, WeightChange, changes
from quickchange_store.formats.tuners.tuner_types import ON_REQUEST, Tuner, tuner_of
from quickchange_store.formats.weight_files import weight_files

LARGEST_BYTES = 4 << 30  # of what PEFT makes by a configuration alone
_REFUSED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "layer_replication",
        "megatron_config",
        "sample_at_inference",
        "target_parameters",
        "trainable_token_indices",
    }
)
_REMEDIES = {
    "sample_at_inference": "set it to false: the mean is served, never a sample",
    "target_parameters": "target the modules (target_modules) instead",
}
# Where the targets are is read before, and the base's name says nothing to PEFT's layers.
_READ_HERE = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "runtime_config",
    "task_type",
)


_BASE_CHANGING = ("pissa", "olora")  # PEFT does it again when it loads
_LORA_KINDS = ("use_bdlora", "kasa_config", "monteclora_config")


def is_made_by_peft(config: Mapping[str, Any]) -> bool:
    """True for a LoRA that is more than A and B: PEFT's layers have to say what it computes."""
    initialised = config.get("init_lora_weights")
    changes_base = isinstance(initialised, str) and initialised.lower().startswith(_BASE_CHANGING)
    return config.get("peft_type") == "LORA" and (
        changes_base or any(is_set(config.get(name)) for name in _LORA_KINDS)
    )


def read_tuner(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:
    """Read the adapter in `directory` for the base model `base`, as far as `limits` allow.

    Raises StoreError; the message names file, key and remedy.
    """
    config = read_config(directory)
    tuner_of(config.get("peft_type"), on_request=limits.approximate is not None)
    names = TensorNames(base)
    paths = weight_files(directory, WEIGHTS_FILE, WRITER)
    tensors = AdapterTensors(*paths, plain=lambda key: _plain(key, names))
    classified = take_classifier(directory, config, base, tensors)
    return classified.joined(_read(classified.config, base, tensors, names, limits))


def _plain(key: str, names: TensorNames) -> str | None:
    """PEFT's name for a tensor of the file; None where it belongs to no module of the base."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    text = without_saving(".".join(parts))
    inner = text.removeprefix(PREFIX).split(".")
    if text.startswith(PREFIX):
        for cut in range(len(inner) - 1, 0, -1):
            path = names.path(".".join(inner[:cut]))
            if path is not None:
                return ".".join([PREFIX + path, *inner[cut:]])
    return text if text.startswith("base_model.") else None


def _read(
    config: Mapping[str, Any],
    base: BaseSpec,
    tensors: AdapterTensors,
    names: TensorNames,
    limits: RankLimits,
) -> Imported:
    kind = config.get("peft_type")
    tuner = tuner_of(kind, on_request=limits.approximate is not None)
    made, warnings = _configuration(config, base)
    check_patterns(config, base.modules, CONFIG_FILE)
    targets = _targets(str(kind), config, base, names)
    if kind in ON_REQUEST and limits.approximate is not None:
        limits = RankLimits(min(limits.exact, limits.approximate), limits.approximate)
    factoring = Factoring(limits)
    updates: dict[str, LowRankUpdate] = {}
    for change in _changes(made, tuner, base, targets, tensors):
        update = _update(change, factoring)
        if update is not None:
            updates[change.path] = update
    updates = with_saved_modules(updates, config, base, tensors, factoring)
    if tensors.left:
        raise InvalidAdapterError(
            f"the tensor is not expected: nothing in {CONFIG_FILE} asks for it, or it belongs to a "
            "module that is not served (linear modules are)",
            file=WEIGHTS_FILE,
            key=tensors.name(min(tensors.left)),
            remedy="use an adapter of this base model, saved with its own configuration",
        )
    source: dict[str, Any] = {
        "format": "peft",
        "config": {key: value for key, value in config.items() if is_set(value)},
    }
    source |= factoring.stated(always=kind in ON_REQUEST)
    name = str(config.get("base_model_name_or_path") or "")
    return Imported(CanonicalAdapter(base.architecture, name, updates, source), tuple(warnings))


def _configuration(config: Mapping[str, Any], base: BaseSpec) -> tuple[Any, list[str]]:
    """PEFT's own configuration, without what is read here, and warnings."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

    made = CLASSES[config["peft_type"]]
    known = {each.name for each in fields(made)}
    refuse_fields(
        config, known=(known | TRAINING_ONLY) - _REFUSED, refused=_REFUSED, remedies=_REMEDIES
    )
    warnings = check_base(config, base)
    _check_sizes(config, base)
    given = {k: v for k, v in config.items() if k in known and k not in _READ_HERE}
    given |= {"inference_mode": True, "target_modules": None}
    try:
        with catch_warnings():
            simplefilter("ignore")  # what PEFT says to those who train
            return made(**given), warnings
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise InvalidAdapterError(
            f"PEFT does not take this configuration ({' '.join(str(error).split())[:400]})",
            file=CONFIG_FILE,
            remedy="correct it, or save the adapter again",
        ) from error


def _check_sizes(config: Mapping[str, Any], base: BaseSpec) -> None:
    """Refuse sizes for which PEFT would make more than a machine has before it reads a tensor."""
    widest = max(shape.in_features + shape.out_features for shape in base.modules.values())
    numbers = max(shape.in_features * shape.out_features for shape in base.modules.values())
    for name, value in config.items():
        patterned = name in ("alpha_pattern", "lambda_pattern", "rank_pattern") and is_set(value)
        if patterned and not isinstance(value, dict):
            raise invalid(name, value, "use an object of module patterns and values")
        if isinstance(value, bool) or not isinstance(value, int) or "seed" in name or "key" in name:
            continue
        rank = name == "r" or name.endswith(("_r", "rank"))
        if abs(value) > max(numbers, 1 << 16) or (rank and value * widest * 8 > LARGEST_BYTES):
            raise invalid(name, value, "use a size that fits the base model's modules")


def _targets(
    kind: str, config: Mapping[str, Any], base: BaseSpec, names: TensorNames
) -> frozenset[str]:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS

    defaults = getattr(TUNERS[kind], "target_module_mapping", {})
    found = find_targets(config, base, defaults, names)
    for path in sorted(found):
        shape = base.modules.get(path)
        if shape is None or shape.kind not in ("linear", "embedding"):
            raise UnsupportedFeatureError(
                f"{path} is a part of experts or of their router, which {kind} is not served on",
                file=CONFIG_FILE,
                key="target_modules",
                remedy="leave the experts out, or train them with LoRA",
            )
        if shape.kind == "embedding" and shape.output_scale != 1:
            raise UnsupportedFeatureError(
                f"{path} scales its output, which {kind} is not served on",
                file=CONFIG_FILE,
                key="target_modules",
                remedy="leave the embedding out, or train it with LoRA",
            )
    return found


def _changes(
    config: Any, tuner: Tuner, base: BaseSpec, targets: frozenset[str], tensors: AdapterTensors
) -> Iterator[WeightChange]:
    """The changes of all targets, one bare model for each where modules share nothing."""
    modules = [path for path in base.modules if path in targets]  # the base's order
    pruned = config.peft_type.value == "ADALORA"  # of every rank, in some modules
    groups = [modules] if tuner.shared else [[path] for path in modules]
    for group in groups:
        taken = {
            key: tensors.take_any(key, empty=pruned)
            for key in sorted(tensors.left)
            if _is_of(key, group) or (tuner.shared and not key.startswith(PREFIX))
        }
        bare = [_bare(config, tuner, base, path, tensors) for path in group]
        yield from changes(_for(config, group), bare, taken)


def _is_of(key: str, modules: list[str]) -> bool:
    path = key.removeprefix(PREFIX)
    return path != key and any(path.startswith(f"{module}.") for module in modules)


def _bare(
    config: Any, tuner: Tuner, base: BaseSpec, path: str, tensors: AdapterTensors
) -> BareModule:
    shape = base.modules[path]
    weight = bias = None
    if tuner.weighs:
        weight = tensors.base_tensor(base, f"{path}.weight", path)
        weight = weight.T if shape.kind == "embedding" else weight
        expected = (shape.out_features, shape.in_features)
        if tuple(weight.shape) != expected or not weight.is_floating_point():
            raise UnsupportedFeatureError(
                f"{config.peft_type.value} needs the base's {path}.weight as plain numbers "
                f"{list(expected)}, and the checkpoint has {weight.dtype} {list(weight.shape)}",
                file=CONFIG_FILE,
                key="peft_type",
                remedy="add the adapter with the base as it was before quantisation (--model)",
            )
    if shape.bias and (tuner.weighs or getattr(config, "bias", "none") != "none"):
        bias = tensors.base_tensor(base, f"{path}.bias", path)
    return BareModule(path, shape, weight, bias)


def _for(config: Any, modules: list[str]) -> Any:
    """The configuration for these modules alone."""
    own = copy.deepcopy(config)
    own.target_modules = list(modules)
    pattern = getattr(own, "rank_pattern", None)
    if own.peft_type.value == "ADALORA" and pattern:
        # AdaLoRA's is by tensor, and PEFT looks each of its modules up.
        own.rank_pattern = {
            name: kept
            for name, kept in pattern.items()
            if any(name.startswith(f"{module}.") for module in modules)
        }
    return own


def _update(change: WeightChange, factoring: Factoring) -> LowRankUpdate | None:
    """The update that makes a change; None where there is no change."""
    bias = None if change.bias is None else change.bias.float()
    found = factoring.factors(change.path, change.weight, "peft_type")
    if not len(found.a) and bias is None:
        return None
    return LowRankUpdate(found.a, found.b, 1.0, bias)
