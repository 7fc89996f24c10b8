"""A small adapter for the store."""

from __future__ import annotations

import pytest
import torch

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate


@pytest.fixture
def small_adapter() -> CanonicalAdapter:
    """One rank-1 update of one module."""
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return CanonicalAdapter("LlamaForCausalLM", "tiny/base", {"model.layers.0.x": update})
