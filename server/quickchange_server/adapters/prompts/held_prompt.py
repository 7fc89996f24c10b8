"""Virtual tokens of an adapter on the host, ready to go into a step.

They stay in the host's memory while the adapter is on either tier: a step that finds their keys and
values in no cached block gets them with its inputs. Knows nothing of tiers, steps or blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.prompt_part import VirtualPrompt

_REMEDY = "add the adapter again with its own base model"


@dataclass(frozen=True, slots=True, eq=False)
class HeldPrompt:
    """Virtual tokens in the model's dtype.

    values: [P, H], vectors in place of the input embedding's; or as a cache [P, layers, 2, KV
    heads, head size].
    """

    values: Tensor
    cached: bool  # True: keys and values; False: vectors

    @property
    def tokens(self) -> int:
        return int(self.values.shape[0])

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Shape of the keys and values that a model's cache holds of a token."""

    layers: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.kv_heads} heads of {self.head_size} numbers"


@dataclass(frozen=True, slots=True)
class PromptShape:
    """What a model takes as virtual tokens; where it takes none, why."""

    embedding: int | str  # width of the input embedding's vectors
    cache: CacheShape | str
    most: int  # tokens of a text, with those in front of it
    dtype: torch.dtype

    def held(self, prompt: VirtualPrompt, pause: Callable[[], None]) -> HeldPrompt:
        """The prompt as steps take it. `pause` is called between pieces of the work.

        Raises AdapterFailedError for one that can't be served.
        """
        cached = prompt.form == "cache"
        allowed = self.cache if cached else self.embedding
        if isinstance(allowed, str):
            raise AdapterFailedError(f"the adapter is {prompt.kind}, and {allowed}")
        if prompt.tokens >= self.most - 1:
            raise AdapterFailedError(
                f"the adapter has {prompt.tokens} virtual tokens, which leave no room for a text "
                f"in a context of {self.most}; raise --max-model-len, if the model allows more"
            )
        shape = list(prompt.values.shape)
        found = CacheShape(shape[0], shape[2], shape[4]) if cached else shape[1]
        if found != allowed:
            unit = "" if cached else " numbers"
            raise AdapterFailedError(
                f"each of its virtual tokens has {found}{unit}, the served model {allowed}{unit}; "
                + _REMEDY
            )
        values = prompt.values.permute(3, 0, 1, 2, 4) if cached else prompt.values
        held = _zeros(values.shape, self.dtype)
        for token, place in enumerate(held):
            for part, given in zip(_parts(place), _parts(values[token]), strict=True):
                part.copy_(given)
                pause()
        if self.dtype is torch.float16 and not _finite(held):
            raise AdapterFailedError(
                "its virtual tokens have numbers beyond float16, in which the model computes: set "
                "--dtype bfloat16 or float32"
            )
        return HeldPrompt(held, cached)


def _parts(token: Tensor) -> Sequence[Tensor]:
    """Parts of a token's numbers that are copied by one thread: its layers, or all of it."""
    return [token] if token.dim() == 1 else list(token)


def _finite(held: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for token in held for part in _parts(token))


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zero tensor, without a parallel region: numpy asks the system for zeroed pages."""
    count = int(np.prod(shape))
    raw = torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(list(shape))
