"""Launchers on a GPU that is not there: what Triton would compile, and what is launched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch_record import recorded_launches
from triton import knobs
from triton.runtime.errors import OutOfResources

from quickchange_kernels.absent_gpu import Launch, absent_gpu
from quickchange_kernels.compile_watch import CompileWatch
from quickchange_kernels.elementwise.silu_mul import silu_mul
from quickchange_kernels.gpu_targets import TARGETS


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that Triton's compiler makes, with an empty cache; not those that it finds there."""
    made: list[str] = []

    def listen(*, src: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            made.append(src.fn.__name__)  # type: ignore[attr-defined]

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return made


def test_a_kernel_is_compiled_once_for_a_target_and_found_again(compiled: list[str]) -> None:
    """The second GPU of the kind looks for the same entry of the cache as the first one made."""
    for target, expected in (("sm_90", 1), ("sm_90", 1), ("sm_80", 2), ("sm_90", 2)):
        with absent_gpu(TARGETS[target]):
            silu_mul(torch.ones(3, 64))
        assert compiled == ["silu_mul_kernel"] * expected


@pytest.mark.usefixtures("compiled")
def test_launches_are_told_with_grid_and_arguments() -> None:
    told: list[Launch] = []
    x = torch.ones(3, 64)
    with absent_gpu(TARGETS["sm_90"], told.append):
        silu_mul(x)
        silu_mul(x)
    assert [launch.kernel for launch in told] == ["silu_mul_kernel"] * 2
    assert told[0].grid == (3, 1, 1)
    assert told[0].arguments["x"].data_ptr() == x.data_ptr()
    assert told[0].arguments["I"] == 32


@pytest.mark.usefixtures("compiled")
def test_what_the_gpu_has_no_shared_memory_for_is_refused() -> None:
    scarce = replace(TARGETS["sm_90"], name="scarce", shared_per_block=-1)
    with absent_gpu(scarce), pytest.raises(OutOfResources, match="shared memory"):
        silu_mul(torch.ones(3, 64))


def test_behind_it_operations_compute_as_before(compiled: list[str]) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = silu_mul(x)
    with recorded_launches() as record:
        silu_mul(x)
    assert torch.equal(silu_mul(x), before)
    assert dict(record.launches) == {"silu_mul_kernel": 1}
    assert compiled == []


def test_a_recorded_key_differs_where_triton_would_compile_again() -> None:
    with recorded_launches() as record:
        silu_mul(torch.ones(3, 64))
        known = record.known()
        silu_mul(torch.ones(5, 64))
        assert record.keys_since(known) == []
        silu_mul(torch.ones(3, 62))
        assert len(record.keys_since(known)) == 1
    assert record.launches.total() == 3


def test_the_watch_counts_kernels_that_come_late_and_names_them(
    compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with absent_gpu(TARGETS["sm_90"]):
        silu_mul(torch.ones(3, 64))
        watch = CompileWatch()
        try:
            silu_mul(torch.ones(3, 64))
            assert (watch.compiled, caplog.text) == (0, "")
            silu_mul(torch.ones(3, 62))
            assert watch.compiled == 1
        finally:
            watch.close()
        silu_mul(torch.ones(3, 64, dtype=torch.bfloat16))
    assert watch.compiled == 1
    assert len(compiled) == 3
    assert "silu_mul_kernel was compiled" in caplog.text
    assert "*fp32" in caplog.text
