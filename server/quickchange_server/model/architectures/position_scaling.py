"""Rotary frequencies that depend on the length of the text: longrope and dynamic NTK, row by row.

transformers chooses them for a whole call by its largest position, which in a flattened batch would
mix texts. Here each row has a reach: the length of the text, in tokens, that its position is scaled
for. With a key-value cache transformers scales a prompt's rows for the prompt's length and each
later row for the length that ends with it; so a row's reach is max(tokens of the prompt, its
position + 1). Phi-3's kind also computes the whole text anew once it outgrows the limit: its reach
is raised for all rows then. Frequencies are chosen on the device, from data of the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quickchange_server.model.forward_context import StepHolder

_Seen = Callable[[Tensor], Mapping[str, Any]]  # from reach int64 [T]
_KINDS = ("short", "long")


@dataclass(frozen=True, slots=True)
class PositionScaling:
    """What the engine must know of a model whose frequencies depend on the text's length."""

    limit: int  # tokens; up to here all texts have the same frequencies
    graded: bool  # True: every length beyond the limit has its own; False: all beyond share them
    anew: bool  # True: a text that outgrows the limit is computed anew

    def kind(self, reach: int) -> int:
        """Equal for prompts of so many tokens whose equal prefixes have equal keys and values."""
        if reach <= self.limit:
            return 0
        return reach if self.graded else 1


def rope_kinds(rotary: nn.Module) -> dict[str | None, str]:
    """Kinds of frequencies of a rotary module by type of layer; None: all layers'."""
    kind = getattr(rotary, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return dict(kind) if isinstance(kind, Mapping) else {}


def scaled_rotaries(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose frequencies depend on the text's length, by path."""
    for path, module in model.named_modules():
        if any(_depends(kind) for kind in rope_kinds(module).values()):
            yield path, module


def scale_by_text(model: nn.Module, holder: StepHolder) -> PositionScaling | None:
    """Replace such modules in place by versions that go by rows' reach; None: there are none."""
    limits: set[int] = set()
    graded = False
    for path, module in list(scaled_rotaries(model)):
        rotary = TextRotary(module, holder)
        limits |= rotary.limits
        graded |= rotary.graded
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, rotary)
    if not limits:
        return None
    # Under several limits, lengths on either side of any of them differ.
    limit = min(limits)
    anew = not graded and len(limits) == 1 and _computes_anew(model, limit)
    return PositionScaling(limit, graded or len(limits) > 1, anew)


def stretched(config: PretrainedConfig, most: int) -> int:
    """Most tokens of a text, from those that are not scaled yet where frequencies grow with it."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    factors = [float(part["factor"]) for part in ropes if part.get("rope_type") == "dynamic"]
    return int(most * max([1.0, *factors]))


class TextRotary(nn.Module):
    """A transformers rotary embedding with frequencies by each row's reach."""

    def __init__(self, original: nn.Module, holder: StepHolder) -> None:
        super().__init__()
        self.original = original
        self._holder = holder
        self.limits: set[int] = set()
        self.graded = False
        # transformers' forward without the choice of frequencies that decorates it
        self._plain: Callable[..., Any] = inspect.unwrap(type(original).forward)
        self._values = nn.ModuleList()  # what the values seen are made by
        self._seen_by_type: dict[str | None, _Seen] = {}
        for layer_type, kind in rope_kinds(original).items():
            if _depends(kind):
                self._seen_by_type[layer_type] = self._seen(kind, layer_type)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the original returns, of position_ids [1, T]."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        seen = self._seen_by_type.get(layer_type)
        if seen is None:
            return self._plain(self.original, x, position_ids, **named)
        step = self._holder.step
        reach = position_ids[0] + 1 if step is None or step.reach is None else step.reach
        return self._plain(_View(self.original, seen(reach)), x, position_ids, **named)

    def _seen(self, kind: str, layer_type: str | None) -> _Seen:
        """What the original's forward must see in place of its own attributes, from the reach."""
        config: PretrainedConfig = self.original.config
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        prefix = "" if layer_type is None else f"{layer_type}_"
        name = f"{prefix}inv_freq"
        device = getattr(self.original, name).device
        short = getattr(self.original, f"{prefix}original_inv_freq").to(device)
        if kind != "longrope":
            limit = int(config.max_position_embeddings)
            self.limits.add(limit)
            self.graded = True
            growing = _DynamicNTK(limit, short, rope["rope_theta"], rope["factor"])
            self._values.append(growing)
            return lambda reach: {name: growing(reach)}
        limit = int(rope["original_max_position_embeddings"])
        self.limits.add(limit)
        if "long_mscale" in rope:
            # PhiMoE: one set of frequencies, which its forward makes anew, and two magnitudes.
            sizes = _TwoSets(limit, *(short.new_tensor([rope[f"{n}_mscale"]]) for n in _KINDS))
            self._values.append(sizes)
            plain = SimpleNamespace(rope_parameters={"rope_type": "default"})
            return lambda reach: {
                "config": plain,
                "rope_init_fn": lambda _: (self.original.original_inv_freq, sizes(reach)),
            }
        initial = ROPE_INIT_FUNCTIONS[kind]
        long, _ = initial(config, device, seq_len=limit + 1, layer_type=layer_type)
        sets = _TwoSets(limit, short, long)
        self._values.append(sets)
        return lambda reach: {name: sets(reach)}


class _View:
    """A module as its forward sees it, with other values under some names."""

    def __init__(self, module: nn.Module, others: Mapping[str, Any]) -> None:
        self._module = module
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _TwoSets(nn.Module):
    """Longrope: one set of values [1, T, F] up to the limit, another beyond."""

    def __init__(self, limit: int, short: Tensor, long: Tensor) -> None:
        super().__init__()
        self._limit = limit
        self.short, self.long = (
            nn.Buffer(short, persistent=False),
            nn.Buffer(long, persistent=False),
        )

    def forward(self, reach: Tensor) -> Tensor:
        return torch.where((reach > self._limit)[None, :, None], self.long, self.short)


class _DynamicNTK(nn.Module):
    """Dynamic NTK: frequencies [1, T, F] whose base grows with the length beyond the limit."""

    def __init__(self, limit: int, short: Tensor, base: float, factor: float) -> None:
        super().__init__()
        dim = 2 * len(short)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=short.device) / dim
        self.short, self.exponents = (
            nn.Buffer(short, persistent=False),
            nn.Buffer(exponents, persistent=False),
        )
        self._limit, self._base, self._factor = limit, base, factor
        self._power = dim / (dim - 2)

    def forward(self, reach: Tensor) -> Tensor:
        ratio = reach.clamp_min(self._limit) / self._limit
        base = self._base * (self._factor * ratio - (self._factor - 1)) ** self._power
        grown = 1.0 / base[:, None] ** self.exponents
        return torch.where((reach > self._limit)[:, None], grown, self.short)[None]


@torch.inference_mode()
def _computes_anew(model: Any, limit: int) -> bool:
    """True if transformers' generation drops a text's keys and values when it outgrows the limit.

    Found by asking it how it would go on behind a cache of `limit` tokens.
    """
    cache = DynamicCache()
    none = torch.zeros(1, 1, limit, 1)
    cache.update(none, none, 0)
    ids = torch.zeros(1, limit + 1, dtype=torch.long)
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, use_cache=True)
    return inputs.get("past_key_values") is None


def _depends(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind
