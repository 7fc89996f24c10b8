"""Both versions of each operation go through the same tests: plain torch, and native C++."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

# ‖out - reference‖ / ‖reference‖, the reference in float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


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
