"""Proof at load: the wrapped model on paged attention gives what transformers' own model gives.

A few short texts of random tokens are read by the model as transformers made it, one by one, with
eager attention and no cache; then by the wrapped one as the engine would: in one flattened batch,
in parts that are cut at different places, down to single rows. All rows' logits must agree. Two
texts stand at position 0, others cross each limit that the configuration names for its positions
(original_max_position_embeddings, for dynamic NTK max_position_embeddings); windows and chunks of
attention, and the scale by which Llama 4 tempers it, are made so short for the proof that the texts
are longer.

Bounded: nine rows a text, two to four texts, each computed twice. Of a stack of layers only the
first of each kind runs (by modules' classes, their parameters' shapes, what they hold and the
layer's type), if the model runs with those alone; and half the layers at most are kept in this way,
or all run. The model is left as it was, whatever happens, and so is torch's generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.architectures.position_scaling import rope_kinds
from quickchange_server.model.forward_context import (
    FIRST_STATE,
    AttentionBatch,
    ForwardContext,
    StatePart,
    StepHolder,
)


class Proved(Protocol):
    """A model that runs steps."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def holder(self) -> StepHolder: ...
    def run(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, V] of asked rows [R], for ids [T] at positions [T]."""
        ...


@dataclass(frozen=True, slots=True)
class ProofCaches:
    """Sizes of the caches that a proof needs."""

    blocks: int
    block_size: int
    state_rows: int


# largest distance of a row's logits from the reference, relative to the row's size
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_ROUNDED = 3e-1  # the same where weights are rounded after the reference, or inputs each time

_LENGTH = 9  # rows of a text
_CUTS = ((0, 4, 7, 8, 9), (0, 3, 7, 8, 9))  # of even and odd texts: the rows of each step
_BEFORE = 3  # rows of a text before the limit that it crosses
_WINDOW = 3  # rows of the shortest window
_BLOCK_SIZE = 16
# Names of what limits or tempers attention, in configurations and modules.
_SHORTENED = ("window", "attention_chunk_size", "floor_scale", "local_attention")


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens [_LENGTH] that stand at positions from `start` on."""

    ids: Tensor
    start: int

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.start, self.start + len(self.ids))


# One step: for each text the rows [begin, end) that it computes.
Step = Sequence[tuple[int, int]]


class ModelProof:
    """What transformers' own model gives for some texts, against which another form is held."""

    def __init__(self, model: nn.Module, *, rounded: bool) -> None:
        """Compute the reference with `model` as it is now.

        rounded: weights are rounded afterwards, or inputs are as they come, in quantised models.
        """
        dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        self._most = _ROUNDED if rounded else TOLERANCE.get(dtype, max(TOLERANCE.values()))
        self._texts = _texts(model)
        if (
            rounded
        ):  # quantised modules may set themselves up in the model's first pass, all at once
            with torch.inference_mode(), _eager(model):
                _logits_of(model, self._texts[0])
        stacks = _kinds_of_layers(model)
        try:
            self._stacks = stacks
            self._expected = self._reference(model)
        except Exception:
            if not stacks:
                raise
            self._stacks = []  # it does not run without all its layers
            self._expected = self._reference(model)

    @property
    def caches(self) -> ProofCaches:
        """The caches that the model must have for `difference`."""
        return ProofCaches(len(self._texts), _BLOCK_SIZE, FIRST_STATE + len(self._texts))

    def difference(self, model: Proved) -> str | None:
        """In what the model, wrapped and with other modules by now, differs; None if in nothing."""
        parts = [_CUTS[number % len(_CUTS)] for number in range(len(self._texts))]
        steps = [
            [(cut[index], cut[index + 1]) for cut in parts] for index in range(len(_CUTS[0]) - 1)
        ]
        found = self._differs(steps, model)
        return None if found is None else self._explained(found, model)

    def _explained(self, found: str, model: Proved) -> str:
        """The difference with what calls it forth: already one text, several, or its parts."""
        whole, none = (0, _LENGTH), (0, 0)
        for number in range(len(self._texts)):
            alone = [whole if each == number else none for each in range(len(self._texts))]
            if error := self._differs([alone], model):
                return f"{error}, already for one text by itself{_hint(model.module)}"
        if error := self._differs([[whole] * len(self._texts)], model):
            return (
                f"{error}, where several texts share a step: rows are not kept apart by their "
                "position_ids"
            )
        return f"{found}, where a text is computed in parts"

    @torch.inference_mode()
    def _reference(self, model: nn.Module) -> list[Tensor]:
        with self._as_proved(model), _eager(model), _kept_state(model):
            return [_logits_of(model, text) for text in self._texts]

    def _differs(self, steps: Sequence[Step], model: Proved) -> str | None:
        worst, where = 0.0, 0
        with self._as_proved(model.module):
            for step in steps:
                logits = self._step(step, model).split([end - at for at, end in step])
                for text, expected, (begin, end), got in zip(
                    self._texts, self._expected, step, logits, strict=True
                ):
                    for row, error in enumerate(_errors(got, expected[begin:end]), begin):
                        if error > worst:
                            worst, where = error, text.start + row
        if worst <= self._most:
            return None
        return f"logits differ from eager attention's by {worst:.1%} at position {where}"

    def _step(self, step: Step, model: Proved) -> Tensor:
        device = next(model.module.parameters()).device
        ids = torch.cat([t.ids[at:end] for t, (at, end) in zip(self._texts, step, strict=True)])
        positions = torch.cat(
            [t.positions[at:end] for t, (at, end) in zip(self._texts, step, strict=True)]
        )
        slots = torch.cat(
            [torch.arange(at, end) + _BLOCK_SIZE * n for n, (at, end) in enumerate(step)]
        )
        reach = torch.cat(
            [
                torch.full((end - at,), t.start + _LENGTH)
                for t, (at, end) in zip(self._texts, step, strict=True)
            ]
        )
        counts = torch.tensor([0] + [end - at for at, end in step])
        batch = AttentionBatch(
            slots=slots.to(device),
            block_tables=torch.arange(len(step), dtype=torch.int32)[:, None].to(device),
            seq_lens=torch.tensor([end for _, end in step], dtype=torch.int32).to(device),
            query_start=counts.cumsum(0).to(torch.int32).to(device),
        )
        states = _state_parts(step, counts.cumsum(0), device)
        model.holder.step = ForwardContext(batch, None, states, reach.to(device))
        try:
            return model.run(ids, positions, torch.arange(len(ids)))
        finally:
            model.holder.step = None

    @contextmanager
    def _as_proved(self, model: nn.Module) -> Iterator[None]:
        """The model with few layers and short windows, as eager attention and paged one meet it."""
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(_short_windows(model))
            for layers, kept in self._stacks:
                stack.enter_context(_only(model, layers, kept))
            yield


def _logits_of(model: nn.Module, text: Text) -> Tensor:
    """Logits [_LENGTH, V] by the model alone, which counts positions itself where it can."""
    device = next(model.parameters()).device
    named = {} if text.start == 0 else {"position_ids": text.positions[None].to(device)}
    output: Any = model(input_ids=text.ids[None].to(device), use_cache=False, **named)
    logits: Tensor = output.logits[0]
    return logits


def _state_parts(step: Step, starts: Tensor, device: torch.device) -> tuple[StatePart, ...]:
    """Each text's rows as a call of recurrent layers, on a state of its own."""
    parts = []
    for number, (at, end) in enumerate(step):
        if end > at:
            first = int(starts[number])
            state = torch.tensor([FIRST_STATE + number], device=device)
            rows = torch.arange(first, first + end - at, device=device)
            parts.append(StatePart(rows, end - at, state if at else None, state, None))
    return tuple(parts)


def _errors(got: Tensor, expected: Tensor) -> list[float]:
    """Distance of each row from the expected one, relative to its size; inf where it is not finite.

    Rows whose reference is not finite are not judged.
    """
    got, expected = got.float(), expected.float()
    size = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = ((got - expected).norm(dim=-1) / size).nan_to_num(nan=float("inf"))
    return torch.where(size.isfinite(), errors, 0.0).tolist()


def _hint(model: nn.Module) -> str:
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    if getattr(config, "is_decoder", True) is False:
        return "; its configuration has is_decoder off, so that each token sees those behind it"
    return ""


def _configs(model: nn.Module) -> list[PretrainedConfig]:
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


def _text_config(model: nn.Module) -> PretrainedConfig:
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    return config.get_text_config(decoder=True)


def _texts(model: nn.Module) -> list[Text]:
    config = _text_config(model)
    limits = _limits(model)
    starts = [0, 0] + [limit - _BEFORE for limit in limits if limit > _BEFORE]
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
        value = getattr(config, name, None)
        special |= set(value if isinstance(value, list) else [value])
    plain = [token for token in range(min(vocabulary, 1 << 12)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(plain), (len(starts), _LENGTH), generator=generator)
    ids = torch.tensor(plain)[drawn]
    return [Text(ids[number], start) for number, start in enumerate(starts)]


def _limits(model: nn.Module) -> list[int]:
    """Positions from which on the configuration says that something changes."""
    config = _text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = {part.get("original_max_position_embeddings") for part in ropes}
    kinds = {kind for m in model.modules() for kind in rope_kinds(m).values()}
    if kinds & {"longrope", "su"}:
        limits.add(getattr(config, "original_max_position_embeddings", None))
    if any("dynamic" in kind for kind in kinds):
        limits.add(config.max_position_embeddings)
    return sorted(int(limit) for limit in limits if limit)


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


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Every window of attention short; windows that differ by one go on doing so."""
    owners: list[Any] = [*_configs(model), *model.modules()]
    found = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if type(value) is int and value > _WINDOW and any(part in name for part in _SHORTENED)
    ]
    short: dict[int, int] = {}
    least = target = 0
    for value in sorted({value for _, _, value in found}):
        if value - 1 not in short:  # no neighbour of the one before: the next size
            least, target = value, min(value, target + 2 if target else _WINDOW)
        short[value] = target + value - least
    with ExitStack() as stack:
        for owner, name, value in found:
            stack.enter_context(_values(owner, {name: short[value]}))
        yield


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """transformers' eager attention in place of the paged one."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


_SMALL = 1 << 14  # values of a buffer that a forward pass may write to, such as frequencies


@contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
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


# A stack of layers and the indices of those that run.
Stack = tuple[nn.ModuleList, list[int]]


def _kinds_of_layers(model: nn.Module) -> list[Stack]:
    """Stacks of attention layers with the first layer of each kind."""
    types = getattr(_text_config(model), "layer_types", None)
    stacks = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not all(map(_attends, module)):
            continue
        kinds: dict[object, int] = {}
        for index, layer in enumerate(module):
            named = types[index] if types and len(types) == len(module) else None
            kinds.setdefault((named, _kind(layer, index)), index)
        if 2 * len(kinds) <= len(module):
            stacks.append((module, sorted(kinds.values())))
    return stacks


def _attends(layer: nn.Module) -> bool:
    return any(hasattr(module, "layer_idx") for module in layer.modules())


def _kind(layer: nn.Module, index: int) -> object:
    """Equal for layers that compute the same but for their parameters' values."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)),
            tuple(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, str)) and (type(value) is bool or value != index)
            ),
        )
        for path, module in layer.named_modules()
    )


@contextmanager
def _only(model: nn.Module, layers: nn.ModuleList, kept: list[int]) -> Iterator[None]:
    """A stack with some of its layers, whose types the configurations then list."""
    count = len(layers)
    modules = dict(layers._modules)
    with ExitStack() as stack:
        for config in _configs(model):
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


def explained(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """The refusal of a model in which something went wrong while it was made ready."""
    name = type(model).__name__
    if isinstance(error, UnsupportedModelError):
        if name in error.message or error.message.startswith("model:"):
            return error
        return UnsupportedModelError(f"{name}: {error.message}", param=error.param)
    reason = " ".join(str(error).split())[:300]
    return UnsupportedModelError(
        f"{name} can't be served: it does not run on a flattened batch "
        f"({type(error).__name__}: {reason})",
        param="model",
    )
