"""Virtual tokens in a step: vectors in place of the input embedding's, and keys and values that no
row computes.

A step that has any runs without a captured graph. Knows nothing of adapters or sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from quickchange_kernels.attention.kv_write import kv_write_


@dataclass(frozen=True, slots=True)
class VirtualRows:
    """What a step is given of virtual tokens: vectors, a cache, or both."""

    rows: Tensor | None = None  # int64 [n] of the step, which take
    vectors: Tensor | None = None  # [n, H]
    slots: Tensor | None = None  # int64 [m]: KV slots, which take
    cache: Tensor | None = None  # [m, layers, 2, KV heads, head size]

    def write_cache(self, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write the keys and values of one layer into its pages."""
        if self.slots is not None and self.cache is not None:
            keys, values = self.cache[:, layer].unbind(1)
            kv_write_(keys, values, k_cache, v_cache, self.slots)


class StepWithVirtualRows(Protocol):
    @property
    def virtual(self) -> VirtualRows | None: ...


class RunningStep(Protocol):
    """Where the running step is found."""

    @property
    def step(self) -> StepWithVirtualRows | None: ...


def take_vectors(embedding: nn.Module, holder: RunningStep) -> None:
    """Let an input embedding give a step's vectors in place of its own, from now on."""

    def replaced(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
        virtual = None if holder.step is None else holder.step.virtual
        if virtual is None or virtual.rows is None or virtual.vectors is None:
            return None
        mixed = output.clone()
        mixed.view(-1, mixed.shape[-1]).index_copy_(0, virtual.rows, virtual.vectors)
        return mixed

    embedding.register_forward_hook(replaced)
