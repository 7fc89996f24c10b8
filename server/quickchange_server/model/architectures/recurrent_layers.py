"""Seam five: transformers' recurrent layers on a pool of states, over the flattened batch.

Layers that keep a state between tokens (gated delta nets, state-space models, short convolutions)
read and write it through transformers' cache interface, whatever they compute. So such a layer
stays as it is, adapters on its linears included; it is called with a cache that hands out the
states of the call's sequences and keeps what the layer leaves there. A layer is known by doing so:
a short pass at load notes which modules leave states in a cache, and of which shapes.

Sequences with one row each share one call, in the layer's own form for decoding; several rows of
one sequence are a call of their own. Which rows, and whose states, is the step's (`StatePart`).
Knows nothing of scheduling.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.architectures.recurrent_scan import ScanFromState, scan_from_state
from quickchange_server.model.forward_context import (
    FIRST_STATE,
    ZERO_STATE,
    AttentionBatch,
    ForwardContext,
    StatePart,
    StepHolder,
)

_CACHE_ARGUMENTS = ("cache_params", "past_key_values")
_PROVEN_ROWS = (5, 2)  # in all; in the first of two chunks
# largest difference in the proof that a layer goes on from a state, relative to a row's largest
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}

# One of a layer's states: a convolution's window, a recurrence's state, or lightning attention's.
Place = tuple[Literal["conv", "recurrent", "linear"], int]


@dataclass(frozen=True, slots=True)
class StateShape:
    """Shape of one of a layer's states for one sequence."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class RecurrentLayer:
    """Stands in the place of a recurrent module's `forward`."""

    def __init__(self, module: nn.Module, shapes: Mapping[Place, StateShape]) -> None:
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.shapes = dict(shapes)
        own = scan_from_state(module)
        self._scan: ScanFromState | None = None
        self._compute: Callable[..., Any] = module.forward
        if own is not None:
            self._scan, self._compute = own
        self._input, self._cache_name, self._cache_at = _arguments(module)
        self._holder = StepHolder()
        self._states: dict[Place, torch.Tensor] = {}

    def install(self, rows: int, device: torch.device, holder: StepHolder) -> None:
        """Make room for `rows` states, and read the steps in `holder` from now on."""
        self._holder = holder
        self._states = {
            place: torch.empty((rows, *shape.size), dtype=shape.dtype, device=device)
            for place, shape in self.shapes.items()
        }
        for states in self._states.values():
            states[ZERO_STATE] = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output [1, T, H] for hidden states [1, T, H], alone or first of a tuple."""
        step = self._holder.step
        if step is None:  # a pass at load, over one sequence from its start
            return self._compute(*args, **kwargs)
        rows = self.input_of(args, kwargs)[0]
        result: torch.Tensor | None = None
        try:
            for part in step.states:
                own = rows if part.rows is None else rows.index_select(0, part.rows)
                # The linears inside add the segments over this part's rows.
                self._holder.step = replace(step, adapters=part.adapters)
                cache = _PartStates(self._states, part)
                if self._scan is not None:
                    self._scan.begin(cache.before_rows())
                out = self._call(own.view(-1, part.length, own.shape[-1]), cache, args, kwargs)
                cache.write()
                first: torch.Tensor = out[0] if isinstance(out, tuple) else out
                first = first.reshape(-1, first.shape[-1])
                if part.rows is None:
                    result = first
                    break
                if result is None:
                    result = first.new_empty(rows.shape[0], first.shape[-1])
                result.index_copy_(0, part.rows, first)
        finally:
            self._holder.step = step
        if result is None:
            raise RuntimeError("a step without states for a model that has recurrent layers")
        whole = result.unsqueeze(0)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states among a call's arguments."""
        hidden: torch.Tensor = args[0] if args else kwargs[self._input]
        return hidden

    def on(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The output for `hidden` in the place of a call's hidden states."""
        out = self(hidden, *args[1:], **kwargs) if args else self(**{**kwargs, self._input: hidden})
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first

    def _call(
        self, rows: torch.Tensor, cache: _StateCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        args, kwargs = _with_cache(cache, self._cache_name, self._cache_at, args, kwargs)
        if args:
            return self._compute(rows, *args[1:], **kwargs)
        return self._compute(**{**kwargs, self._input: rows})


class _StateCache(ABC):
    """The part of transformers' cache interface that recurrent layers use."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        del layer_idx
        return self._read(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        del layer_idx
        return self._read(("recurrent", state_idx))

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        del layer_idx
        return self._read(("linear", 0))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,  # [sequences, C, rows]
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> torch.Tensor:
        """The columns with those before them; the last `conv_kernel_size` are kept."""
        del layer_idx
        size = conv_kernel_size or conv_states.shape[-1]
        before = self._read(("conv", state_idx))
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], size)
        columns = torch.cat([before, conv_states], -1)
        self._keep(("conv", state_idx), columns[..., -size:])
        return columns

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        del layer_idx
        self._keep(("recurrent", state_idx), recurrent_states)
        return recurrent_states

    def set_linear_cache(self, layer_idx: int, states: torch.Tensor) -> None:
        del layer_idx
        self._keep(("linear", 0), states)

    def is_recording_past(self, layer_idx: int) -> bool:
        del layer_idx
        return False

    @abstractmethod
    def _read(self, place: Place) -> torch.Tensor | None:
        """A state before the call's rows; None: they begin without one."""

    @abstractmethod
    def _keep(self, place: Place, states: torch.Tensor) -> None:
        """Take a state as the layer left it."""


class _PartStates(_StateCache):
    """States of the sequences in one call, from the pool and back."""

    def __init__(self, pool: Mapping[Place, torch.Tensor], part: StatePart) -> None:
        self._pool = pool
        self._part = part
        self._now: dict[Place, torch.Tensor] = {}

    def before_rows(self) -> torch.Tensor | None:
        """The recurrence's states before several rows of each sequence; None if there are none."""
        return self._read(("recurrent", 0)) if self._part.length > 1 else None

    def write(self) -> None:
        """Keep the states as the layer left them: replaced, or changed in place."""
        for place, states in self._pool.items():
            states.index_copy_(0, self._part.write, self._now[place].to(states.dtype))

    def _read(self, place: Place) -> torch.Tensor | None:
        if place not in self._now:
            if self._part.read is None:
                return None
            self._now[place] = self._pool[place].index_select(0, self._part.read)
        return self._now[place]

    def _keep(self, place: Place, states: torch.Tensor) -> None:
        self._now[place] = states


class _Recording(_StateCache):
    """Notes the states that a module leaves in a cache that was empty before."""

    def __init__(self, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """call: the arguments that `module` is called with."""
        self.shapes: dict[Place, StateShape] = {}
        self.call = call
        self._module = module

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are: paged attention keeps them elsewhere."""
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModelError(
            f"{type(self._module).__name__} keeps state between tokens in a way that is not "
            f"supported yet (its cache's {name})"
        )

    def _read(self, place: Place) -> torch.Tensor | None:
        del place
        return None

    def _keep(self, place: Place, states: torch.Tensor) -> None:
        self.shapes[place] = StateShape(tuple(states.shape[1:]), states.dtype)


@contextmanager
def noting_states(model: nn.Module) -> Iterator[Callable[[], tuple[RecurrentLayer, ...]]]:
    """Note during the block which modules keep states in a cache; afterwards, put the seam in.

    The block must run one pass through `model`; the function that it is given then replaces the
    modules' `forward` and returns what stands there.
    """
    recordings: dict[nn.Module, _Recording] = {}

    def give(module: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        _, name, at = _arguments(module)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            recordings[module] = _Recording(module, (args, kwargs))
            return _with_cache(recordings[module], name, at, args, kwargs)

        return hook

    hooks = [
        module.register_forward_pre_hook(give(module), with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx") and _cache_argument(module) is not None
    ]

    def put_in() -> tuple[RecurrentLayer, ...]:
        found: list[RecurrentLayer] = []
        proven: set[type[nn.Module]] = set()
        for module, recording in recordings.items():
            if recording.shapes:
                found.append(RecurrentLayer(module, recording.shapes))
                outline = any(each.is_meta for each in module.parameters())
                if type(module) not in proven and not outline:
                    _refuse_forgetful(module, found[-1], *recording.call)
                    proven.add(type(module))
                module.forward = found[-1]
        return tuple(found)

    try:
        yield put_in
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _refuse_forgetful(
    module: nn.Module, layer: RecurrentLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a layer that gives something else for rows in two chunks than for all at once."""
    like = layer.input_of(args, kwargs)
    count, first = _PROVEN_ROWS
    rows = torch.randn(1, count, like.shape[-1], generator=torch.Generator().manual_seed(0))
    rows = rows.to(like)
    holder = StepHolder()
    layer.install(FIRST_STATE + 1, like.device, holder)

    def computed(begin: int, end: int) -> torch.Tensor:
        holder.step = _alone(end - begin, like.device, goes_on=begin > 0)
        return layer.on(rows[:, begin:end], args, kwargs)

    expected = computed(0, count)
    in_chunks = torch.cat([computed(0, first), computed(first, count)], 1)
    scale = expected.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(expected.dtype).tiny)
    difference = float(((in_chunks - expected).abs() / scale).max())
    if not difference < _TOLERANCE[expected.dtype]:
        raise UnsupportedModelError(
            f"{type(module).__name__} forgets what came before a chunk of tokens (its output "
            f"differs by {difference:.1g}); such layers are not supported yet"
        )


def _alone(count: int, device: torch.device, *, goes_on: bool) -> ForwardContext:
    """The step in which one sequence computes `count` rows. goes_on: behind others."""
    row = torch.tensor([FIRST_STATE], device=device)
    part = StatePart(None, count, row if goes_on else None, row, None)
    none = torch.empty(0, device=device)
    return ForwardContext(AttentionBatch(none, none, none, none), None, (part,))


def bytes_per_state(layers: Sequence[RecurrentLayer]) -> int:
    """Bytes of one sequence's states in all layers."""
    return sum(shape.nbytes for layer in layers for shape in layer.shapes.values())


def _cache_argument(module: nn.Module) -> str | None:
    """Name of the parameter by which `module` takes a cache."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in names), None)


def _arguments(module: nn.Module) -> tuple[str, str, int]:
    """Name of the parameter that takes hidden states; name and index of the one for the cache."""
    names = list(inspect.signature(module.forward).parameters)
    cache = _cache_argument(module)
    if cache is None:
        raise ValueError(f"{type(module).__name__} takes no cache")
    return names[0], cache, names.index(cache)


def _with_cache(
    cache: _StateCache, name: str, at: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with `cache` in the place of what was given for it."""
    if at < len(args):
        return (*args[:at], cache, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: cache}
