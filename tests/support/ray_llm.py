"""Quickchange behind Ray Serve LLM's engine protocol, in this process and over the fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import fake_engine
from fake_engine import Behaviour
from http_support import BASE_SPEC
from ray.serve.llm import LLMConfig
from text_support import byte_text

from quickchange_server.cluster.llm.llm_engine import QuickchangeEngine
from quickchange_server.engine_client.local.local_engines import LocalEngines

BASE = "tiny"


def llm_config(**changes: Any) -> LLMConfig:
    """A model of the fake engine on a CPU; `changes` are of LLMConfig's fields."""
    given = {
        "model_loading_config": {"model_id": BASE, "model_source": "unused"},
        "accelerator_config": {"kind": "cpu"},
        **changes,
    }
    return LLMConfig(**given)


@asynccontextmanager
async def fake_llm_engine(
    config: LLMConfig | None = None, behaviour: Behaviour | None = None
) -> AsyncIterator[QuickchangeEngine]:
    """A started engine of Ray's protocol, over the fake engine."""
    engine = QuickchangeEngine(
        config or llm_config(),
        text=byte_text(eos=frozenset()),
        engines=partial(
            LocalEngines, main=partial(fake_engine.main, behaviour=behaviour or Behaviour())
        ),
        base=lambda: BASE_SPEC,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()
