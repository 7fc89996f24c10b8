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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import ModuleShape
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.low_rank import EXACT_ERROR
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import PREFIX

if TYPE_CHECKING:
    import torch

_SAME = 3e-5  # of the outputs' size: some of PEFT's layers compute in float32
_SMALL = 1e-2  # of the module's own output: the update's least size for that comparison
_SEEDS = (11, 12)
_ROWS_AT_ONCE = 1024
_SKETCH = 41  # random inputs: a change of up to about 32 ranks is found from one call


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
    response = _Response.of(layer, module)
    if response.drew or not _same_numbers(layer, twin):
        _check_again(kind, module, response, twin)
    change = response.low_rank_change(module)
    if change is not None:
        return change
    bias = response.bias
    weight = _merged(twin, module)
    if weight is None or not response.is_of(module, weight):
        weight = _of_units(layer, module, bias)
    if response.is_of(module, weight):
        return WeightChange(module.path, weight, bias if bool(bias.any()) else None)
    raise UnsupportedFeatureError(
        f"what this {kind} does at {module.path} is no linear map of the module's input",
        file=CONFIG_FILE,
        key="peft_type",
        remedy="merge it into the base with PEFT (merge_and_unload), or train a LoRA instead",
    )


def _check_again(kind: str, module: BareModule, response: _Response, twin: Any) -> None:
    """Refuse a layer that does something else when it is loaded again."""
    again, _ = _response(twin, module, response.probe)
    if not _near(again, response.expected, response.size):
        raise UnsupportedFeatureError(
            f"PEFT draws random numbers when it loads this {kind}, and the folder does not hold "
            "what was drawn in training",
            file=CONFIG_FILE,
            key="init_lora_weights" if kind == "LORA" else "peft_type",
            remedy=_DRAWN_REMEDY,
        )


def _same_numbers(layer: Any, twin: Any) -> bool:
    """True if all that two layers are made of is equal, so that both compute the same."""
    pairs = zip(layer.modules(), twin.modules(), strict=True)
    return all(_same(vars(one), vars(other)) for one, other in pairs)


def _same(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray | np.generic):
        return bool(np.array_equal(one, other))
    # Modules are compared themselves; other objects say nothing of what is computed.
    return one == other if isinstance(one, int | float | complex | str | bytes | set) else True


@dataclass(frozen=True)
class _Response:
    """What a layer adds to its module's output, for the inputs that it is measured by.

    All in one call, since many layers make a whole weight in each.
    """

    probe: torch.Tensor  # inputs to compare two maps by
    expected: torch.Tensor  # what is added for them
    bias: torch.Tensor  # [out]: what is added for an input of zeros
    size: float  # of what is added, for comparisons
    drew: bool  # random numbers were drawn
    inputs: torch.Tensor | None = None  # [1, n, in], of a linear: the last ones for its factors
    outputs: torch.Tensor | None = None  # the layer's own [1, n, out], from which it can be asked
    added: torch.Tensor | None = None  # [n, out]

    @classmethod
    def of(cls, layer: Any, module: BareModule) -> _Response:
        """Call `layer` once, or for an embedding once and with nothing added for zeros."""
        import torch

        probe, before = _probe(module.shape), torch.get_rng_state()
        if module.shape.kind == "embedding":
            expected, own = _response(layer, module, probe)
            bias = torch.zeros(module.shape.out_features, dtype=torch.float64)
            drew = not torch.get_rng_state().equal(before)
            return cls(probe, expected, bias, _size(expected, own), drew)
        rows = probe.flatten(0, 1)
        drawn = torch.Generator().manual_seed(_SEEDS[1])
        sample = torch.randn(_SKETCH, rows.shape[1], generator=drawn, dtype=torch.float64)
        inputs = torch.cat([rows, torch.zeros(1, rows.shape[1], dtype=rows.dtype), sample])[None]
        inputs.requires_grad_()
        own = _output(module, inputs.detach())[0]
        try:
            with torch.enable_grad(), _without_identities():
                outputs = layer(inputs)
        except _OF_PEFT as error:
            raise _refused_by_peft(error) from error
        added = outputs.detach().double()[0] - own
        expected = added[: len(rows)].view(*probe.shape[:2], -1)
        size = _size(expected, own[: len(rows)])
        drew = not torch.get_rng_state().equal(before)
        return cls(probe, expected, added[len(rows)], size, drew, inputs, outputs, added)

    def is_of(self, module: BareModule, weight: torch.Tensor) -> bool:
        """True if a map of this weight and the bias adds the same."""
        return _near(_linear(module, weight, self.probe) + self.bias, self.expected, self.size)

    def low_rank_change(self, module: BareModule) -> WeightChange | None:
        """The change, if it is linear and of a low rank; None where that is not sure.

        What is added for random inputs spans the change's outputs, and the layer's own derivative
        gives its product with those; the probe, which had no part in this, must agree.
        """
        import torch

        small = min(module.shape.in_features, module.shape.out_features) <= 2 * _SKETCH
        if small or self.inputs is None or self.outputs is None or self.added is None:
            return None
        if not self.outputs.requires_grad or self.outputs.dtype != torch.float64:
            return None
        basis = torch.linalg.qr((self.added[-_SKETCH:] - self.bias).T)[0]  # [out, n]
        asked = torch.zeros_like(self.outputs)
        asked[0, -_SKETCH:] = basis.T
        (found,) = torch.autograd.grad(self.outputs, self.inputs, asked)
        parts = found[0, -_SKETCH:]
        if module.weight is not None:
            parts = parts - basis.T @ module.weight.double()
        weight = basis @ parts
        norm = float(torch.linalg.matrix_norm(parts))
        missed = self.expected - _linear(module, weight, self.probe) - self.bias
        # Of normal inputs, the mean square of what a matrix makes is that of its elements.
        left = float(missed.square().sum(-1).mean().sqrt())
        if not left <= EXACT_ERROR * norm:
            return None
        bias = self.bias if bool(self.bias.any()) else None
        return WeightChange(module.path, weight, bias)


def _without_identities() -> AbstractContextManager[Any]:
    """Leave out products with an identity, which cost as much as others.

    HRA and its kin begin with one: it is a third of the time of a layer of 2,048 features.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutIdentities(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.mm and _is_identity(args[0]) and args[0].dtype == args[1].dtype:
                return args[1].clone()
            return func(*args, **(kwargs or {}))

    return WithoutIdentities()


def _is_identity(matrix: torch.Tensor) -> bool:
    import torch

    square = matrix.shape[0] == matrix.shape[1]
    ones = square and bool((matrix.diagonal() == 1).all())
    return ones and int(torch.count_nonzero(matrix)) == len(matrix)


def _size(expected: torch.Tensor, own: torch.Tensor) -> float:
    return max(float(expected.abs().max()), _SMALL * float(own.abs().max()))


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


def _near(found: torch.Tensor, expected: torch.Tensor, size: float) -> bool:
    return bool(found.isfinite().all()) and float((found - expected).abs().max()) <= _SAME * size


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
