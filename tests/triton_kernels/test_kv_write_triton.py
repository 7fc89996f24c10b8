"""kv_write_'s Triton kernel against its reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from quickchange_kernels.attention.kv_write import kv_write_, reference_kv_write


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim"),
    [(1, 16, 16), (3, 20, 20), (3, 24, 17), (2, 3, 40), (10, 600, 512)],
)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(
    count: int,
    heads: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    sanitized: Callable[..., AbstractContextManager[None]],
) -> None:
    caches = [
        torch.randn(6, heads, 4, width, generator=generator).to(dtype) for width in (dim, value_dim)
    ]
    values_from = 28 + heads * dim
    columns = values_from + heads * value_dim + 7
    fused = torch.randn(count, columns, generator=generator).to(dtype)
    slots = torch.randperm(24, generator=generator)[:count]
    slots[2:4] = -1  # padding

    def parts(rows: torch.Tensor) -> list[torch.Tensor]:
        return [
            rows[:, first : first + heads * width].view(count, heads, width)
            for first, width in ((20, dim), (values_from, value_dim))
        ]

    expected = reference_kv_write(*parts(fused), *caches, slots)
    there = [cache.to(device) for cache in caches]
    with sanitized():
        kv_write_(*parts(fused.to(device)), *there, slots.to(device))
    for cache, wanted in zip(there, expected, strict=True):
        assert torch.equal(cache.cpu(), wanted)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    k, cache = torch.zeros(2, 1, 8, device=device), torch.zeros(3, 1, 16, 8, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="slots must be contiguous int64"):
        kv_write_(k, k, cache, cache, slots.int())
    with pytest.raises(TypeError, match="all must be equal"):
        kv_write_(k.half(), k, cache, cache, slots)
    with pytest.raises(ValueError, match="do not fit together"):
        kv_write_(k, k, cache, cache, slots[:1])
