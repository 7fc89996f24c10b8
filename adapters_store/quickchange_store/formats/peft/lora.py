"""Reader of PEFT LoRA and DoRA directories: `adapter_config.json` and `adapter_model.safetensors`.

Every targeted module must have its tensors and every tensor must be understood: an adapter is read
completely or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.classification_head import take_classifier
from quickchange_store.formats.peft.expert_lora import expert_updates
from quickchange_store.formats.peft.invocation_tokens import take_invocation
from quickchange_store.formats.peft.peft_common import open_tensors
from quickchange_store.formats.peft.peft_config import LoraSettings, parse_config
from quickchange_store.formats.peft.saved_modules import with_saved_modules
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.peft.token_rows import named_tokens, take_token_rows
from quickchange_store.formats.rank_limits import EXACT_ONLY, Factoring, RankLimits
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.vocabulary.resized_vocabulary import resized_base

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 4096  # rows of the weight in memory at once in float32


def read_peft(directory: Path, base: BaseSpec, limits: RankLimits = EXACT_ONLY) -> Imported:
    """Read the LoRA or DoRA adapter in `directory` for the base model `base`.

    The base's own weights are opened only for adapters that need them: DoRA, and copies of the
    base's parameters (trained biases, stored as the difference, and embeddings). Raises
    InvalidAdapterError, UnsupportedFeatureError, BaseMismatchError and BaseModelError; the message
    names file, key and remedy.
    """
    activated = take_invocation(read_config(directory))
    tensors, names = open_tensors(directory, base)
    base = resized_base(base, tensors, PREFIX, named_tokens(activated.config))
    classified = take_classifier(directory, activated.config, base, tensors)
    rows = take_token_rows(classified.config, base, tensors)
    read = rows.joined(read_lora(rows.config, base, tensors, names, limits), base)
    return activated.joined(classified.joined(read), base)


def read_lora(
    config: Mapping[str, Any],
    base: BaseSpec,
    tensors: AdapterTensors,
    names: TensorNames,
    limits: RankLimits = EXACT_ONLY,
) -> Imported:
    """Read a LoRA from its configuration and its tensors by PEFT's names. Raises as `read_peft`."""
    settings, warnings = parse_config(config, base, names)
    updates = {}
    for module in base.modules:  # the base's order, not the file's
        update = _module_update(tensors, settings, base, module)
        if update is not None:
            updates[module] = update
    updates |= expert_updates(tensors, settings, base)
    factoring = Factoring(limits)
    updates = with_saved_modules(updates, config, base, tensors, factoring)
    _refuse_leftovers(tensors, settings, base)
    source = {**settings.source, **factoring.stated()}
    adapter = CanonicalAdapter(base.architecture, settings.base_name, updates, source)
    return Imported(adapter, tuple(warnings))


def _module_update(
    tensors: AdapterTensors, settings: LoraSettings, base: BaseSpec, module: str
) -> LowRankUpdate | None:
    """The update of one module of the base, None where the adapter leaves it alone."""
    import torch

    change = _base_bias_change(tensors, settings, base, module)
    if module not in settings.targets:
        if change is None:
            return None
        shape = base.modules[module]
        a, b = torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0)
        return LowRankUpdate(a, b, 1.0, change)
    a, b = _factors(tensors, settings, base, module)
    scale = settings.scale(module)
    if settings.lora_bias and base.modules[module].kind == "linear":
        out = (base.modules[module].out_features,)
        own = tensors.take_shaped(f"{PREFIX}{module}.lora_B.bias", module, out).float() * scale
        change = own if change is None else own + change
    update = LowRankUpdate(a, b, scale * base.modules[module].output_scale, change)
    return _with_magnitude(tensors, base, module, update, scale) if settings.dora else update


def _with_magnitude(
    tensors: AdapterTensors, base: BaseSpec, module: str, update: LowRankUpdate, scale: float
) -> LowRankUpdate:
    """The update with DoRA: g ⊙ (W x + scale · B A x) in place of W x, g by `dora_gain`.

    PEFT leaves the base's bias out of it, so what the gain does to that bias is taken back.
    """
    shape = base.modules[module]
    key = f"{PREFIX}{module}.lora_magnitude_vector"
    magnitude = tensors.take_shaped(key, module, (shape.out_features,)).float()
    weight = tensors.base_tensor(base, f"{module}.weight", key)
    expected = (shape.out_features, shape.in_features)
    if shape.kind == "embedding":
        weight = weight.T
    if tuple(weight.shape) != expected or not weight.is_floating_point():
        raise UnsupportedFeatureError(
            f"DoRA needs the base's {module}.weight as plain numbers {list(expected)}, and the "
            f"checkpoint has {weight.dtype} {list(weight.shape)}",
            file=tensors.file_of(key),
            key=key,
            remedy="add the adapter with the base as it was before quantisation (--model)",
        )
    gain = dora_gain(magnitude, weight, update.a, update.b, scale)
    if not bool(gain.isfinite().all()):
        raise InvalidAdapterError(
            f"a row of {module}'s weight and its update are zero, so DoRA has no direction for it",
            file=tensors.file_of(key),
            key=key,
            remedy="train again, or leave the module out",
        )
    bias = update.bias
    if shape.bias:
        own = (1 - gain) * tensors.base_tensor(base, f"{module}.bias", key).float()
        bias = own if bias is None else bias + own
    return replace(update, b=gain[:, None] * update.b.float(), gain=gain, bias=bias)


def dora_gain(
    magnitude: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Gain magnitude / ‖W + scale · B A‖ of each row, [out] float32.

    magnitude [out], weight [out, in], a [r, in], b [out, r]; computed in float32.
    """
    import torch

    norms = []
    for begin in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        merged = weight[rows].float() + scale * (b[rows].float() @ a.float())
        norms.append(torch.linalg.vector_norm(merged, dim=1))
    return magnitude / torch.cat(norms)


def _factors(
    tensors: AdapterTensors, settings: LoraSettings, base: BaseSpec, module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a targeted module: A [r, in] and B [out, r]."""
    shape = base.modules[module]
    names = ("lora_A.weight", "lora_B.weight")
    if shape.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    keys = tuple(f"{PREFIX}{module}.{name}" for name in names)
    a, b = (tensors.take(key) for key in keys)
    rank = settings.rank(module)
    found = {a.shape[0], b.shape[-1]} if a.ndim == b.ndim == 2 else set()
    if found and found != {rank}:
        raise InvalidAdapterError(
            f"A {list(a.shape)} and B {list(b.shape)} are not of rank {rank}, which {CONFIG_FILE} "
            "gives to this module",
            file=tensors.file_of(keys[0]),
            key=tensors.name(keys[0]),
            remedy="correct r or rank_pattern, or save the adapter again",
        )
    b = tensors.take_shaped(keys[1], module, (shape.out_features, rank))
    if settings.pooled > 1 and a.ndim == 2 and a.shape[1] * settings.pooled == shape.in_features:
        return _unpooled(a, settings.pooled), b
    return tensors.take_shaped(keys[0], module, (rank, shape.in_features)), b


def _unpooled(a: torch.Tensor, group: int) -> torch.Tensor:
    """A [r, in] for QALoRA's [r, in / group], which reads means of groups, times their number."""
    return a.float().repeat_interleave(group, 1) * (a.shape[1] / group)


def _base_bias_change(
    tensors: AdapterTensors, settings: LoraSettings, base: BaseSpec, module: str
) -> torch.Tensor | None:
    """Trained minus original bias of the base's module, [out] float32; None without a change."""
    targeted = module in settings.targets
    if settings.bias == "none" or not (targeted or settings.bias == "all"):
        return None
    if not base.modules[module].bias or base.modules[module].kind == "norm":
        return None  # a norm's is read with whatever is saved whole
    key = f"{PREFIX}{module}.base_layer.bias"
    if not targeted or (key not in tensors and f"{PREFIX}{module}.bias" in tensors):
        key = f"{PREFIX}{module}.bias"  # also the name under which older versions of PEFT saved it
    trained = tensors.take_shaped(key, module, (base.modules[module].out_features,))
    change = trained.float() - tensors.base_tensor(base, f"{module}.bias", key).float()
    return change if bool(change.any()) else None


def _refuse_leftovers(tensors: AdapterTensors, settings: LoraSettings, base: BaseSpec) -> None:
    if not tensors.left:
        return
    key = min(tensors.left)
    own = tensors.name(key)
    more = f" ({len(tensors.left) - 1} more like it)" if len(tensors.left) > 1 else ""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    experts = {path.rpartition(".")[0] for path in base.experts}
    of_experts = module.removesuffix(".base_layer") in experts
    known = module in base.modules or module in settings.names.expert_modules or of_experts
    if part and not known:
        raise BaseMismatchError(
            f"the base model {base.architecture} has no linear or input embedding module "
            f"{module!r}{more}",
            file=tensors.file_of(key),
            key=own,
            remedy="use an adapter of this base model; linear and input embedding modules are "
            "served, experts and their routers",
        )
    reason = "nothing in adapter_config.json asks for it"
    if part and of_experts:
        reason = "target_parameters asks for fewer of the experts' parameters"
    elif part and module not in settings.targets:
        reason = f"target_modules does not cover {own.partition('.lora_')[0]}"
    raise InvalidAdapterError(
        f"the tensor is not expected: {reason}{more}",
        file=tensors.file_of(key),
        key=own,
        remedy=f"save the adapter again, so that {CONFIG_FILE} and its tensors agree",
    )
