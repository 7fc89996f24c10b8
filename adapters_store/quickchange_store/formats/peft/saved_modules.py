"""Modules whose parameters an adapter's folder holds whole: PEFT's `modules_to_save`, and copies.

What counts is the difference to the base's own parameters. Of a norm it is a gain and a bias on its
output. Of a linear or an embedding it is an update: one rank for each row that changed where those
are few, else the difference's factors as far as the limits on ranks allow. A copy that changes
nothing is no update: PEFT saves the embedding beside its LoRA.

A module in `modules_to_save` is replaced alone. A copy that PEFT loads into the base itself also
changes what is tied to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
    ModuleShape,
)
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    is_set,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.patterns import check_patterns
from quickchange_store.formats.peft.classification_head import take_classifier
from quickchange_store.formats.peft.peft_common import (
    SAVED,
    WEIGHTS_FILE,
    check_base,
    find_targets,
    open_tensors,
    saved_names,
    with_tied,
)
from quickchange_store.formats.peft.tensor_names import PREFIX
from quickchange_store.formats.rank_limits import Factoring, RankLimits
from quickchange_store.formats.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

_ORIGINAL = ".original_module."  # in a state dict: the module as it was, beside its copy
_HONOURED = frozenset(
    {
        SAVED,
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "peft_type",
        "target_modules",
        "task_type",
    }
)
_HARMLESS = frozenset({"inference_mode", "peft_version", "revision"})


def read_norm_tuning(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:
    """Read the LN_TUNING adapter in `directory`, whose targets are whole. Raises StoreError."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as DEFAULTS

    tensors, names = open_tensors(directory, base)
    classified = take_classifier(directory, read_config(directory), base, tensors)
    config = classified.config
    refuse_fields(config, known=_HONOURED | _HARMLESS, refused=(), remedies={})
    warnings = check_base(config, base)
    check_patterns(config, base.modules, CONFIG_FILE)
    targets = find_targets(config, base, DEFAULTS, names, norms=True)
    factoring = Factoring(limits)
    updates = with_saved_modules({}, config, base, tensors, factoring, targets)
    adapter = as_configured(updates, config, base, tensors, factoring)
    return classified.joined(Imported(adapter, tuple(warnings)))


def as_configured(
    updates: Mapping[str, LowRankUpdate],
    config: Mapping[str, Any],
    base: BaseSpec,
    tensors: AdapterTensors,
    factoring: Factoring,
) -> CanonicalAdapter:
    """The adapter of updates that were read by a configuration of modules alone.

    Raises InvalidAdapterError for tensors that are left.
    """
    if tensors.left:
        raise InvalidAdapterError(
            "the tensor is not expected: target_modules does not cover it",
            file=WEIGHTS_FILE,
            key=tensors.name(min(tensors.left)),
            remedy=f"save the adapter again, so that {CONFIG_FILE} and its tensors agree",
        )
    source = {
        "format": "peft",
        "config": {key: value for key, value in config.items() if is_set(value)},
        **factoring.stated(),
    }
    name = str(config.get("base_model_name_or_path") or "")
    return CanonicalAdapter(base.architecture, name, dict(updates), source)


def with_saved_modules(
    updates: Mapping[str, LowRankUpdate],
    config: Mapping[str, Any],
    base: BaseSpec,
    tensors: AdapterTensors,
    factoring: Factoring,
    alone: frozenset[str] = frozenset(),
) -> dict[str, LowRankUpdate]:
    """`updates`, and what the parameters that the file holds whole change, in the base's order.

    alone: modules that are replaced as those in `modules_to_save` are, whatever the field says.
    Raises StoreError.
    """
    found = dict(updates)
    endings = saved_names(config)
    named = frozenset(path for path in base.modules if _is_below(path, endings))
    saved = alone | with_tied(config, base, named)
    for path in base.modules:  # one at a time: a head may take gigabytes
        keys = _copies(path, tensors)
        if not keys and path in saved:
            tensors.take(f"{PREFIX}{path}.weight")  # which says that it is missing
        tied = () if path in saved else base.tied_to(path)
        for module, change in _changes(base, path, keys, tied, tensors, factoring).items():
            key = tensors.name(min(keys.values()))
            found[module] = _joined(module, change, found.get(module), key)
    for key in [key for key in tensors.left if _ORIGINAL in key]:
        tensors.left.discard(key)
    for key in sorted(tensors.left):
        if _is_below(key.removeprefix(PREFIX).rpartition(".")[0], endings):
            raise UnsupportedFeatureError(
                f"{SAVED} asks for it, and it is no weight or bias of a linear, of the input "
                f"embedding, of a router or of a norm of the base model {base.architecture}",
                file=tensors.file_of(key),
                key=tensors.name(key),
                remedy="train without it, or merge the adapter into the base",
            )
    return {path: found[path] for path in (*base.modules, *updates) if path in found}


def _is_below(path: str, endings: tuple[str, ...]) -> bool:
    """True for a module that PEFT saves by the field, or that is within one."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(endings) for end in range(1, len(parts) + 1))


def _copies(path: str, tensors: AdapterTensors) -> dict[str, str]:
    """Keys of a module's own parameters in the file, by `weight` and `bias`."""
    return {
        name: key
        for name in ("weight", "bias")
        for key in (f"{PREFIX}{path}.{name}", f"{PREFIX}{path}.base_layer.{name}")
        if key in tensors.left
    }


def _changes(
    base: BaseSpec,
    path: str,
    keys: Mapping[str, str],
    tied: tuple[str, ...],
    tensors: AdapterTensors,
    factoring: Factoring,
) -> dict[str, LowRankUpdate]:
    """The updates that a copy of a module makes, of it and of those that are tied to it."""
    found: dict[str, LowRankUpdate] = {}
    shape = base.modules[path]
    if "weight" in keys:
        weight = _Parameter.taken(base, path, "weight", keys["weight"], tensors)
        _refuse_others(tied, keys["weight"], tensors)
        if weight.changed and shape.kind == "norm":
            found[path] = _norm_change(base, path, weight, keys["weight"], tensors)
        elif weight.changed:
            found = _weight_changes(base, (path, *tied), weight, factoring)
    if "bias" in keys:
        bias = _Parameter.taken(base, path, "bias", keys["bias"], tensors)
        own = found.get(path, _nothing(shape))
        if bias.changed:
            more = bias.saved.float() - bias.original.float()
            found[path] = replace(own, bias=more if own.bias is None else own.bias + more)
    return found


@dataclass(frozen=True)
class _Parameter:
    """A parameter as the folder has it, and the base's."""

    saved: torch.Tensor
    original: torch.Tensor  # of the same shape

    @classmethod
    def taken(
        cls, base: BaseSpec, path: str, name: str, key: str, tensors: AdapterTensors
    ) -> _Parameter:
        """Take the tensor `key`. Raises StoreError where it can't be compared with the base's."""
        shape = base.modules[path]
        saved = tensors.take(key)
        if shape.transposed and name == "weight":
            saved = saved.T
        expected = _expected(shape, name)
        if tuple(saved.shape) != expected:
            raise _other_shape(base, path, saved, expected, key, tensors)
        original = tensors.base_tensor(base, f"{path}.{name}", key)
        if tuple(original.shape) != expected or not original.is_floating_point():
            raise UnsupportedFeatureError(
                f"it must be compared with the base's {path}.{name} as plain numbers "
                f"{list(expected)}, and the checkpoint has {original.dtype} {list(original.shape)}",
                file=tensors.file_of(key),
                key=tensors.name(key),
                remedy="add the adapter with the base as it was before quantisation (--model)",
            )
        return cls(saved, original)

    @property
    def changed(self) -> bool:
        """False for a copy of what the base has, which may be rounded to a shorter dtype."""
        return not bool((self.original.to(self.saved.dtype) == self.saved).all())

    def changed_rows(self) -> torch.Tensor:
        """Indices of the rows of a matrix that are no such copies."""
        same = self.original.to(self.saved.dtype) == self.saved
        return (~same.all(1)).nonzero().flatten()


def _other_shape(
    base: BaseSpec,
    path: str,
    saved: torch.Tensor,
    expected: tuple[int, ...],
    key: str,
    tensors: AdapterTensors,
) -> BaseMismatchError | UnsupportedFeatureError:
    said = f"shape {list(saved.shape)}, while {path} of the base model has {list(expected)}"
    file, own = tensors.file_of(key), tensors.name(key)
    tokens = base.modules[path].kind == "embedding" or path == base.output_head
    if tokens and saved.shape[1:] == expected[1:]:
        remedy = "train without resizing the vocabulary"
        return UnsupportedFeatureError(said, file=file, key=own, remedy=remedy)
    remedy = "use an adapter of this base model"
    return BaseMismatchError(said, file=file, key=own, remedy=remedy)


def _expected(shape: ModuleShape, name: str) -> tuple[int, ...]:
    if shape.kind == "embedding":
        return (shape.in_features, shape.out_features)
    one = name == "bias" or shape.kind == "norm"
    return (shape.out_features,) if one else (shape.out_features, shape.in_features)


def _refuse_others(tied: tuple[str, ...], key: str, tensors: AdapterTensors) -> None:
    """Take the copies of the same weight for modules that are tied, which must be equal."""
    for other in (key for path in tied for key in _copies(path, tensors).values()):
        if not tensors.take(other).equal(tensors.take(key)):
            raise InvalidAdapterError(
                f"it differs from {tensors.name(key)}, and the base model has one weight for both",
                file=tensors.file_of(other),
                key=tensors.name(other),
                remedy=f"name both in {SAVED}, by which PEFT trains them apart, or save it again",
            )


def _weight_changes(
    base: BaseSpec, paths: tuple[str, ...], weight: _Parameter, factoring: Factoring
) -> dict[str, LowRankUpdate]:
    """Updates of modules that share a weight, [out, in] or an embedding's [tokens, width]."""
    a, b = _factors(paths[0], weight, factoring)
    found = {}
    for path in paths:
        shape = base.modules[path]
        first, second = (b.T, a.T) if shape.kind == "embedding" else (a, b)
        found[path] = LowRankUpdate(first.contiguous(), second.contiguous(), shape.output_scale)
    return found


def _factors(
    path: str, weight: _Parameter, factoring: Factoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, columns] and B [rows, r] of the change, which few rows may be alone."""
    import torch

    rows = weight.changed_rows()
    change = weight.saved[rows].double() - weight.original[rows].double()
    count = len(weight.saved)
    if len(rows) <= factoring.limits.exact and 2 * len(rows) <= count:
        a, own = change.float(), torch.eye(len(rows))
    else:
        found = factoring.factors(path, change, SAVED)
        a, own = found.a, found.b
    b = torch.zeros(count, own.shape[1])
    b[rows] = own
    return a, b


def _norm_change(
    base: BaseSpec, path: str, weight: _Parameter, key: str, tensors: AdapterTensors
) -> LowRankUpdate:
    """The gain by which a norm's trained weight differs, and what it does to the base's bias."""
    shape = base.modules[path]
    before = weight.original.double() + shape.weight_offset
    after = weight.saved.double() + shape.weight_offset
    lost = (before == 0) & (after != 0)
    if bool(lost.any()):
        raise UnsupportedFeatureError(
            f"the base's {path} multiplies {int(lost.sum())} of its outputs by 0, so no factor of "
            "them says what the adapter's copy makes",
            file=tensors.file_of(key),
            key=tensors.name(key),
            remedy="merge the adapter into the base, or train without this norm",
        )
    gain = (after / before).where(before != 0, 1.0)
    bias = None
    if shape.bias:
        own = tensors.base_tensor(base, f"{path}.bias", key).double()
        bias = ((1 - gain) * own).float()
    return replace(_nothing(shape), gain=gain.float(), bias=bias)


def _nothing(shape: ModuleShape) -> LowRankUpdate:
    """An update of rank 0."""
    import torch

    a, b = torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0)
    return LowRankUpdate(a, b, 1.0)


def _joined(
    module: str, change: LowRankUpdate, update: LowRankUpdate | None, key: str
) -> LowRankUpdate:
    """A module's change, and then the update of the module so changed."""
    import torch

    if update is None:
        return change
    if update.rank and not update.plain:
        raise UnsupportedFeatureError(
            f"the adapter replaces {module} and has an update of it that depends on its weight",
            file=WEIGHTS_FILE,
            key=key,
            remedy="train the module in one of the two ways",
        )
    gain = update.gain
    factor = torch.ones(len(change.b)) if gain is None else gain.float()
    bias = None if change.bias is None else factor * change.bias
    if update.bias is not None:
        bias = update.bias.float() if bias is None else bias + update.bias.float()
    a = torch.cat([change.a.float(), update.a.float()])
    b = torch.cat(
        [change.scale * factor[:, None] * change.b.float(), update.scale * update.b.float()], 1
    )
    if change.gain is not None:
        gain = change.gain if gain is None else gain * change.gain
    return LowRankUpdate(a, b, 1.0, bias, gain=gain)
