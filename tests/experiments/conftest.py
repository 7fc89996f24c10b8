"""Makes `experiment_support` importable by name; an adapter for the store."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from quickchange_store.canonical import CanonicalAdapter, LowRankUpdate

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def small_adapter() -> CanonicalAdapter:
    """One rank-1 update of one module."""
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return CanonicalAdapter("LlamaForCausalLM", "tiny/base", {"model.layers.0.x": update})
