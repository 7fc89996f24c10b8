"""Every version of an operation goes through the same tests: plain torch, and native C++ for each
instruction set that the machine has. Where the native kernels can't be built their tests skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from quickchange_kernels import native

# ‖out - reference‖ / ‖reference‖, the reference in float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
INSTRUCTION_SETS = ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline"]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    def check(out: torch.Tensor, reference: torch.Tensor) -> None:
        assert torch.isfinite(out).all()
        error = (out.double() - reference).norm() / reference.norm().clamp_min(1e-30)
        assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"

    return check


def require_native() -> None:
    """Skip where there is no compiler: the native kernels can't be built."""
    if not native.ensure():
        pytest.skip("the native kernels can't be built here")


@pytest.fixture
def native_kernels() -> None:
    require_native()


@contextmanager
def using(instruction_set: str) -> Iterator[str]:
    """Dispatched calls use this instruction set's native kernels; skips where there are none."""
    require_native()
    try:
        torch.ops.quickchange_native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    yield instruction_set
    torch.ops.quickchange_native.use_instruction_set("best")


@pytest.fixture(params=INSTRUCTION_SETS)
def native_version(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.fixture(params=["plain", *INSTRUCTION_SETS])
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "plain", or the instruction set that dispatched calls use during the test."""
    if request.param == "plain":
        yield "plain"
        return
    with using(request.param) as name:
        yield name
