"""kv_move_'s Triton kernels against its reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from quickchange_kernels.kv_move import kv_move_, reference_kv_move


@pytest.mark.parametrize("count", [0, 1, 24])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 20)])
def test_every_source_is_read_before_a_slot_is_written(
    count: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    sanitized: Callable[..., AbstractContextManager[None]],
) -> None:
    caches = [torch.randn(6, heads, 4, dim, generator=generator).to(dtype) for _ in range(2)]
    source, target = (torch.randperm(24, generator=generator)[:count] for _ in range(2))
    target[2:4] = -1  # padding
    source[2:3] = 2**40
    expected = reference_kv_move(*caches, source, target)
    there = [cache.to(device) for cache in caches]
    with sanitized():
        kv_move_(*there, source.to(device), target.to(device))
    for cache, wanted in zip(there, expected, strict=True):
        assert torch.equal(cache.cpu(), wanted)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    cache = torch.zeros(3, 1, 16, 8, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="do not fit together"):
        kv_move_(cache, cache.clone(), slots, slots[:1])
    with pytest.raises(ValueError, match="do not fit together"):
        kv_move_(cache, cache.clone(), slots.int(), slots)
