"""Attention's launches need no kernel beyond those that its shape lists, whatever the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from recorded_launches import Key, key_of, launches_recorded

from quickchange_kernels.attention import kv_write_triton, paged_attention_triton
from quickchange_kernels.attention.paged_attention_triton import AttentionShape
from quickchange_kernels.gpu_targets import TARGETS, Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [
    AttentionShape(4, 1, 64, 64, windows=(False, True)),
    AttentionShape(9, 3, 40, 24, page=32, softcap=True),
    AttentionShape(8, 8, 20, 20, sinks=True, windows=(True,)),
    AttentionShape(2, 1, 576, 512, slopes=True),
]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sizes of one call, and where its operands begin."""

    rows: int
    sequences: int
    blocks: int  # of a row of the block table
    window: int
    scale: float
    softcap: float
    offset: int  # elements before the queries, and index entries before each table
    fused: int  # further elements of a row of queries

    def queries(self, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        row = heads * dim + self.fused
        whole = torch.empty(self.offset + self.rows * row, dtype=dtype)
        return whole[self.offset :].view(self.rows, row)[:, : heads * dim].view(-1, heads, dim)

    def table(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.zeros(self.offset + count, dtype=torch.int32)[self.offset :].view(shape)


batches = st.builds(
    Batch,
    rows=st.integers(1, 300),
    sequences=st.integers(1, 70),
    blocks=st.one_of(st.integers(1, 40), st.just(8192)),
    window=st.integers(1, 5000),
    scale=st.sampled_from([1, 0.125, 1.0]),
    softcap=st.sampled_from([1, 16, 50.0]),
    offset=st.integers(0, 17),
    fused=st.sampled_from([0, 1, 8, 64, 4096]),
)


def attend(shape: AttentionShape, dtype: torch.dtype, batch: Batch, windowed: bool) -> None:
    by_head = torch.zeros(batch.offset + shape.heads)[batch.offset :]
    paged_attention_triton.launch_paged_attention(
        batch.queries(shape.heads, shape.dim, dtype),
        torch.empty(2, shape.kv_heads, shape.page, shape.dim, dtype=dtype),
        torch.empty(2, shape.kv_heads, shape.page, shape.value_dim, dtype=dtype),
        batch.table(batch.sequences, batch.blocks),
        batch.table(batch.sequences),
        batch.table(batch.sequences + 1),
        batch.scale,
        batch.window if windowed else 0,
        batch.softcap if shape.softcap else 0,
        by_head if shape.sinks else None,
        by_head if shape.slopes else None,
    )


def listed(shape: AttentionShape, dtype: str, target: Target) -> set[Key]:
    return {key_of(one, target) for one in shape.compilations("any", dtype, target)}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"width {shape.dim}")
def test_every_batch_of_a_shape_is_served_by_the_kernels_that_are_listed(
    shape: AttentionShape, dtype: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = TARGETS[target]
    monkeypatch.setattr(paged_attention_triton, "target_of", lambda _: on)
    compiled_ahead = listed(shape, dtype, on)
    needed: set[Key] = set()

    @settings(max_examples=20, deadline=None, database=None)
    @given(batch=batches)
    def launches_are_listed(batch: Batch) -> None:
        with launches_recorded(on) as launches:
            for windowed in shape.windows:
                attend(shape, DTYPES[dtype], batch, windowed)
        needed.update(launches)
        assert launches.keys() <= compiled_ahead

    launches_are_listed()
    every_kind = Batch(300, 8, 20, 100, 1.0, 5.0, 0, 0)
    with launches_recorded(on) as launches:
        for windowed in shape.windows:
            attend(shape, DTYPES[dtype], every_kind, windowed)
    assert launches.keys() == compiled_ahead, "a kernel is listed that no batch needs"
    assert needed <= compiled_ahead


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(64, 64), (20, 24), (192, 128)])
def test_every_batch_is_written_by_one_kernel(dtype: str, widths: tuple[int, int]) -> None:
    heads, (dim, value_dim), on = 3, widths, TARGETS["sm_90"]
    one = kv_write_triton.compilation("any", heads, dim, value_dim, page=16, dtype=dtype)

    @settings(max_examples=30, deadline=None, database=None)
    @given(batch=batches, blocks=st.integers(1, 9))
    def one_kernel_serves(batch: Batch, blocks: int) -> None:
        with launches_recorded(on) as launches:
            kv_write_triton.launch_kv_write_(
                batch.queries(heads, dim, DTYPES[dtype]),
                batch.queries(heads, value_dim, DTYPES[dtype]),
                torch.empty(blocks, heads, 16, dim, dtype=DTYPES[dtype]),
                torch.empty(blocks, heads, 16, value_dim, dtype=DTYPES[dtype]),
                torch.zeros(batch.rows + 1, dtype=torch.int64)[batch.offset % 2 :][: batch.rows],
            )
        assert set(launches) == {key_of(one, on)}

    one_kernel_serves()


def test_a_cache_at_an_odd_address_is_refused() -> None:
    cache = torch.empty(1 + 2 * 16 * 8)[1:].view(2, 1, 16, 8)
    tables = [torch.zeros(shape, dtype=torch.int32) for shape in ((1, 2), (1,), (2,))]
    with pytest.raises(ValueError, match="k_cache must be contiguous and begin at a multiple of"):
        paged_attention_triton.launch_paged_attention(
            torch.empty(1, 1, 8), cache, cache, *tables, 1.0
        )
