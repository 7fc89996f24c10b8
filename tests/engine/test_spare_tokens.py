"""Spare tokens change nothing for requests whose adapters add none: tokens, chances, drafts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from hypothesis import given
from hypothesis import strategies as st
from served_model import random_adapter
from tiny_models import VOCABULARY, save_model
from turbo_adapters import random_heads

from quickchange_kernels.lowrank.lowrank_contract import Segments
from quickchange_server.engine.scheduling.scheduler import Scheduler
from quickchange_server.model.spare_tokens import fence_
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.tokenizer_part import AddedToken, TokenizerChanges

SPARE = 7
FAMILIES = ("llama", "llama-tied", "gemma2", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("model"))


def adding(model: Path, count: int) -> CanonicalAdapter:
    """A LoRA that adds `count` tokens, whose rows make them the best of all."""
    own = random_adapter(model, 4, seed=2)
    return own
