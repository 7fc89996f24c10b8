"""PEFT's own layers over bare modules: what an adapter computes, by the code that trained it.

A bare model has the base's targeted modules at their paths and nothing else, in float64. PEFT puts
its layers around them, as it does around a whole model, and takes the adapter's tensors; so every
field of a configuration means what it means to PEFT. Each layer is then measured as a linear map.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import ModuleShape
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import PREFIX

if TYPE_CHECKING:
    import torch

_SAME = 3e-5  # of the outputs' size: some of PEFT's layers compute in float32
_SMALL = 1e-2  # of the module's own output: the update's least size for that comparison
_SEEDS = (11, 12)
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class BareModule:
    """A targeted module of the base, with the weight [out, in] and bias that PEFT's layer wraps.

    None stands for zeros, where the update depends on neither.
    """

    path: str
    shape: ModuleShape
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class WeightChange:
    """What a layer adds to its module's output: `weight` [out, in] x + `bias` [out], float64."""

    path: str
    weight: torch.Tensor
    bias: torch.Tensor | None


def changes(
    config: Any, modules: Sequence[BareModule], tensors: Mapping[str, torch.Tensor]
) -> Iterator[WeightChange]:
    """The change of each module under PEFT's configuration `config`, which is left as it is.

    tensors: all of the modules', by PEFT's names. Raises InvalidAdapterError where they are not
    those that PEFT asks for, BaseMismatchError where their shapes are not, UnsupportedFeatureError
    where a layer is no linear map or depends on numbers that PEFT draws when it loads.
    """
    kind = str(config.peft_type.value)
    models = [_loaded(config, modules, tensors, seed) for seed in _SEEDS]
    for module in modules:
        first, second = (model.get_submodule(PREFIX + module.path) for model in models)
        if not hasattr(first, "base_layer"):
            raise UnsupportedFeatureError(
                f"PEFT leaves {module.path} alone, though it is targeted",
                file=CONFIG_FILE,
                key="target_modules",
                remedy="target linear modules",
            )
        with _own_weight(module, first), _own_weight(module, second):
            yield _measured(kind, module, first, second)


_DRAWN_REMEDY = (
    "save it so that the file holds all of it (for PiSSA and the like: save_pretrained with "
    "path_initial_model_for_weight_conversion), or merge it into the base"
)


def _drawing(kind: str) -> str:
    return "init_lora_weights" if kind == "LORA" else "peft_type"


# --- measuring ----------------------------------------------------------------------------------


def _measured(kind: str, module: BareModule, layer: Any, twin: Any) -> WeightChange:
    """The change that `layer` makes; `twin` is the same, loaded again, and may be spoilt."""
    probe = _probe(module.shape)
    expected, own = _response(layer, module, probe)
    size = max(float(expected.abs().max()), _SMALL * float(own.abs().max()))
    again, _ = _response(twin, module, probe)
    if not _near(again, expected, size):
        raise UnsupportedFeatureError(
            f"PEFT draws random numbers when it loads this {kind}, and the folder does not hold "
            "what was drawn in training",
            file=CONFIG_FILE,
            key="init_lora_weights" if kind == "LORA" else "peft_type",
            remedy=_DRAWN_REMEDY,
        )
    bias = _bias(layer, module)
    weight = _merged(twin, module)
    if weight is None or not _near(_applied(module, weight, bias, probe), expected, size):
        weight = _of_units(layer, module, bias)
    if _near(_applied(module, weight, bias, probe), expected, size):
        return WeightChange(module.path, weight, bias if bool(bias.any()) else None)
    raise UnsupportedFeatureError(
        f"what this {kind} does at {module.path} is no linear map of the module's input",
        file=CONFIG_FILE,
        key="peft_type",
        remedy="merge it into the base with PEFT (merge_and_unload), or train a LoRA instead",
    )


def _probe(shape: ModuleShape) -> torch.Tensor:
    """Inputs to compare two maps by."""
    import torch

    drawn = torch.Generator().manual_seed(_SEEDS[0])
    if shape.kind == "embedding":
        return torch.randint(shape.in_features, (3, 7), generator=drawn)
    return torch.randn(3, 7, shape.in_features, generator=drawn, dtype=torch.float64)


def _response(
    layer: Any, module: BareModule, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer adds to the module's output, and that output."""
    import torch

    own = _output(module, inputs)
    try:
        with torch.no_grad():
            return layer(inputs).double() - own, own
    except _OF_PEFT as error:
        raise _refused_by_peft(error) from error


def _output(module: BareModule, inputs: torch.Tensor) -> torch.Tensor:
    import torch

    if module.weight is None:
        own = torch.zeros(*inputs.shape[:2], module.shape.out_features, dtype=torch.float64)
    else:
        own = _linear(module, module.weight.double(), inputs)
    return own if module.bias is None else own + module.bias.double()


def _linear(module: BareModule, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return weight.T[inputs] if module.shape.kind == "embedding" else inputs @ weight.T


def _applied(
    module: BareModule, weight: torch.Tensor, bias: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    return _linear(module, weight, inputs) + bias


def _near(found: torch.Tensor, expected: torch.Tensor, size: float) -> bool:
    return bool(found.isfinite().all()) and float((found - expected).abs().max()) <= _SAME * size


def _bias(layer: Any, module: BareModule) -> torch.Tensor:
    """What the layer adds to the output for an input of zeros, [out]."""
    import torch

    if module.shape.kind == "embedding":
        return torch.zeros(module.shape.out_features, dtype=torch.float64)
    zeros = torch.zeros(1, 1, module.shape.in_features, dtype=torch.float64)
    return _response(layer, module, zeros)[0][0, 0]


def _merged(layer: Any, module: BareModule) -> torch.Tensor | None:
    """The weight's change as PEFT merges it; None where it can't."""
    import torch

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge()
    except _OF_PEFT:
        return None  # measured by its outputs instead
    merged: torch.Tensor = layer.get_base_layer().weight.data.double()
    if module.shape.transposed or module.shape.kind == "embedding":
        merged = merged.T
    return merged if module.weight is None else merged - module.weight.double()


def _of_units(layer: Any, module: BareModule, bias: torch.Tensor) -> torch.Tensor:
    """The weight's change by the layer's outputs for every unit vector."""
    import torch

    columns = []
    for begin in range(0, module.shape.in_features, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, module.shape.in_features)
        if module.shape.kind == "embedding":
            inputs = torch.arange(begin, end)[None]
        else:
            inputs = torch.zeros(1, end - begin, module.shape.in_features, dtype=torch.float64)
            inputs[0, :, begin:end].fill_diagonal_(1)
        columns.append((_response(layer, module, inputs)[0][0] - bias).T)
    return torch.cat(columns, 1)


# --- building -----------------------------------------------------------------------------------


def _loaded(
    config: Any, modules: Sequence[BareModule], tensors: Mapping[str, torch.Tensor], seed: int
) -> Any:
    """PEFT's model over the bare modules with the adapter's tensors, evaluated in float64."""
    import torch
    from peft import get_peft_model
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what PEFT says to those who train
        torch.manual_seed(seed)
        try:
            own = copy.deepcopy(config)
            model: Any = get_peft_model(_bare(modules), own, autocast_adapter_dtype=False)
            _widen(model)
            result = set_peft_model_state_dict(model, dict(tensors))
            asked = get_peft_model_state_dict(model, save_embedding_layers=False)
        except _OF_PEFT as error:
            raise _refused_by_peft(error) from error
    _check_names(set(tensors), set(asked), set(result.unexpected_keys))
    return model.eval().requires_grad_(False)


def _widen(model: Any) -> None:
    """Make every float32 a float64, those of PEFT's shared tensors once for all who share them."""
    import torch

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == torch.float32:
                parameter.data = _wide(parameter.data)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == torch.float32:
                module._buffers[name] = _wide(buffer)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() > 1 and not any(tensor.stride()):  # zeros that take no memory
        return tensor.flatten()[0].double().expand(tensor.shape)
    return tensor.double()


# What PEFT raises for configurations and tensors that don't fit; it has no class of its own.
_OF_PEFT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


def _refused_by_peft(error: Exception) -> InvalidAdapterError | BaseMismatchError:
    said = " ".join(str(error).split())[:400]
    if "size mismatch" in said:
        return BaseMismatchError(
            f"the tensors' shapes are not those that {CONFIG_FILE} and the base model ask for "
            f"({said})",
            file=WEIGHTS_FILE,
            remedy="use an adapter of this base model, saved with its own configuration",
        )
    return InvalidAdapterError(
        f"PEFT can't load it ({type(error).__name__}: {said})",
        file=CONFIG_FILE,
        remedy="save the adapter again with PEFT's save_pretrained, for this base model",
    )


def _check_names(found: set[str], asked: set[str], unexpected: set[str]) -> None:
    if missing := asked - found:
        raise InvalidAdapterError(
            f"the tensor is missing, while {CONFIG_FILE} asks for it",
            file=WEIGHTS_FILE,
            key=min(missing),
            remedy="save the adapter again, with all its tensors and their own names",
        )
    if left := unexpected | (found - asked):
        raise InvalidAdapterError(
            f"the tensor is not expected: nothing in {CONFIG_FILE} asks for it",
            file=WEIGHTS_FILE,
            key=min(left),
            remedy=f"save the adapter again, so that {CONFIG_FILE} and its tensors agree",
        )


def _bare(modules: Sequence[BareModule]) -> Any:
    """A model of the modules alone, in float32, in which PEFT makes what it doesn't save.

    Weights that no update depends on take no memory.
    """
    import torch

    root = torch.nn.Module()
    for module in modules:
        parent = root
        *above, name = module.path.split(".")
        for part in above:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, _bare_module(module))
    return root.requires_grad_(False)


def _bare_module(module: BareModule) -> Any:
    import torch
    from transformers.pytorch_utils import Conv1D

    shape, made = module.shape, torch.nn.Module()
    with torch.device("meta"):
        if shape.kind == "embedding":
            made = torch.nn.Embedding(shape.in_features, shape.out_features)
        elif shape.transposed:
            made = Conv1D(shape.out_features, shape.in_features)
        else:
            made = torch.nn.Linear(shape.in_features, shape.out_features, bias=shape.bias)
    turned = shape.transposed or shape.kind == "embedding"
    for name, given in (("weight", module.weight), ("bias", module.bias)):
        empty = getattr(made, name, None)
        if empty is None:
            continue
        value = torch.zeros(()).expand(empty.shape)
        if given is not None:
            value = given.float().clone()
            value = value.T.contiguous() if name == "weight" and turned else value
        setattr(made, name, torch.nn.Parameter(value, requires_grad=False))
    return made


@contextmanager
def _own_weight(module: BareModule, layer: Any) -> Iterator[None]:
    """Give the layer's module memory for a merged weight while it is measured."""
    if module.weight is not None:
        yield
        return
    base = layer.get_base_layer()
    shared = base.weight.data
    base.weight.data = shared.clone()
    try:
        yield
    finally:
        base.weight.data = shared
