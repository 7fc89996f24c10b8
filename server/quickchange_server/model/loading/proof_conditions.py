"""Conditions under which a model is proved: few layers, short windows, a reference's attention.

Each holds for a while; afterwards the model is what it was, whatever happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

_WINDOW = 3  # rows of the shortest window
# Names of what limits or tempers attention, in configurations and modules.
_SHORTENED = ("window", "attention_chunk_size", "floor_scale", "local_attention")
_SERVED_WITHIN = "keep_window_size"  # Doge's, past which no text is served
_SMALL = 1 << 14  # values of a buffer that a forward pass may write to, such as frequencies
# A stack of layers and the indices of those that run.
Stack = tuple[nn.ModuleList, list[int]]


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """All configurations that the model's modules read, each once, outer ones first."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: PretrainedConfig) -> None:
        if id(config) in found:
            return
        found[id(config)] = config
        for name in config.sub_configs:
            inner = getattr(config, name, None)
            if isinstance(inner, PretrainedConfig):
                add(inner)

    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            add(config)
    return list(found.values())


def text_config(model: nn.Module) -> PretrainedConfig:
    config: PretrainedConfig = model.config
    return config.get_text_config(decoder=True)


@contextmanager
def _values(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    """Instance attributes with other values, past all setters, for a while."""
    attributes = vars(owner)
    saved = {name: attributes[name] for name in values}
    attributes.update(values)
    try:
        yield
    finally:
        attributes.update(saved)


def shortened(sizes: Set[int]) -> dict[int, int]:
    """A short size for each, in the same order; those that differ by one go on doing so."""
    short: dict[int, int] = {}
    for size in sorted(sizes):
        last = max(short, default=0)
        step = 1 if size == last + 1 else 2
        short[size] = min(size, short[last] + step) if short else min(size, _WINDOW)
    return short


def windows_of(model: nn.Module) -> list[tuple[Any, str, int]]:
    """Configurations and modules that hold a size of attention's windows or chunks: (holder, name,
    size)."""
    owners: list[Any] = [*configs_of(model), *model.modules()]
    return [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if type(value) is int and value > _WINDOW and any(part in name for part in _SHORTENED)
        if name != _SERVED_WITHIN
    ]


@contextmanager
def short_windows(model: nn.Module, short: Mapping[int, int]) -> Iterator[None]:
    """Windows of other sizes, by those that they had when the proof began."""
    with ExitStack() as stack:
        for owner, name, size in windows_of(model) if short else ():
            nearest = min(short, key=lambda known: abs(known - size))
            value = max(short[nearest] + size - nearest, 1)
            stack.enter_context(_values(owner, {name: value}))
        yield


@contextmanager
def reference_attention(model: nn.Module) -> Iterator[None]:
    """transformers' eager attention in place of the paged one.

    For Falcon with ALiBi its SDPA: eager attention adds the bias twice there.
    """
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _reference_attention(config)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _reference_attention(config: PretrainedConfig) -> str:
    """The implementation that computes what is meant: Falcon's eager one adds ALiBi twice."""
    adds_twice = config.model_type == "falcon" and getattr(config, "alibi", False)
    return "sdpa" if adds_twice else "eager"


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Attributes and small buffers of all modules as they were, after a pass that may set them."""
    saved = [
        (module, dict(vars(module)), dict(module._buffers), _copies(module))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, copies in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            for tensor, copy in copies:
                tensor.copy_(copy)


def _copies(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    small = [b for b in module._buffers.values() if b is not None and b.numel() <= _SMALL]
    return [(buffer, buffer.clone()) for buffer in small]


def kinds_of_layers(model: nn.Module) -> list[Stack]:
    """Stacks of attention layers with the first layer of each kind."""
    types = getattr(text_config(model), "layer_types", None)
    stacks = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not any(map(_attends, module)):
            continue
        kinds: dict[object, int] = {}
        for index, kind in enumerate(_kinds(module)):
            named = types[index] if types and len(types) == len(module) else None
            kinds.setdefault((named, kind), index)
        if 2 * len(kinds) <= len(module):
            stacks.append((module, sorted(kinds.values())))
    return stacks


def _attends(layer: nn.Module) -> bool:
    return any(hasattr(module, "layer_idx") for module in layer.modules())


def _kinds(layers: nn.ModuleList) -> list[object]:
    """One for each layer, equal for those that compute the same but for their parameters' values.

    Attributes that count the layers tell them apart no more than their places do.
    """
    every = [_facts(layer) for layer in layers]
    counting = {
        key
        for key, first in every[0].items()
        if type(first) is int
        and all(facts.get(key) == first + index for index, facts in enumerate(every))
    }
    return [frozenset((k, v) for k, v in facts.items() if k not in counting) for facts in every]


def _facts(layer: nn.Module) -> dict[tuple[str, str], object]:
    """Classes, parameters' shapes and plain attributes of a layer's modules."""
    facts: dict[tuple[str, str], object] = {}
    for path, module in layer.named_modules():
        facts[path, "class"] = type(module)
        for name, parameter in module.named_parameters(recurse=False):
            facts[path, name] = (parameter.shape, parameter.dtype)
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, str)):
                facts[path, name] = value
    return facts


@contextmanager
def only_layers(model: nn.Module, layers: nn.ModuleList, kept: list[int]) -> Iterator[None]:
    """A stack with some of its layers, whose types the configurations then list."""
    count = len(layers)
    modules = dict(layers._modules)
    with ExitStack() as stack:
        for config in configs_of(model):
            own: dict[str, Any] = {}
            types = vars(config).get("layer_types")
            if isinstance(types, list) and len(types) == count:
                own["layer_types"] = [types[index] for index in kept]
            if vars(config).get("num_hidden_layers") == count:
                own["num_hidden_layers"] = len(kept)
            stack.enter_context(_values(config, own))
        layers._modules.clear()
        layers._modules.update({str(n): modules[str(index)] for n, index in enumerate(kept)})
        try:
            yield
        finally:
            layers._modules.clear()
            layers._modules.update(modules)
