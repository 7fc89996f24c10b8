"""For Triton kernels: on a real GPU where there is one, else under Triton's interpreter.

The interpreter replaces the compiler for a whole process, so it has a run of its own:

    TRITON_INTERPRET=1 python -m pytest tests/triton_kernels

Without that variable and without a GPU nothing here is collected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from quickchange_kernels import dispatch

INTERPRETED = dispatch.triton_interpreted()
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]
if INTERPRETED:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import triton_interpreter

    triton_interpreter.install()

# ‖out - reference‖ / ‖reference‖, the reference in float64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run. "cpu" is the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def generator() -> torch.Generator:
    """On the CPU whatever the device, so that each gets the same numbers: draw, then move."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Checks against a reference in float64, by the tolerance of the output's dtype."""

    def check(out: torch.Tensor, reference: torch.Tensor) -> None:
        assert out.shape == reference.shape
        assert torch.isfinite(out).all()
        expected = reference.double().to(out.device)
        error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"

    return check


@pytest.fixture
def sanitized() -> Callable[..., AbstractContextManager[None]]:
    """`with sanitized(): launch(...)`: raises on accesses out of bounds, races between programs
    and false hints, with programs in shuffled order. On a real GPU it checks nothing."""
    if not INTERPRETED:
        return lambda *_reachable, **_seed: contextlib.nullcontext()
    import triton_sanitizer

    return triton_sanitizer.sanitized
