"""`ray.serve.llm` in this process, with stand-ins for vLLM's models, and an engine over the fake."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fake_engine
from fake_engine import Behaviour
from http_support import BASE_SPEC
from text_support import byte_text

STANDINS = Path(__file__).with_name("vllm_standins")


def _import() -> None:
    """Import it once: it takes the root logger over, which is given back."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    sys.path.append(str(STANDINS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve.llm  # noqa: F401
    root.handlers[:], root.level = before


_import()

from ray.serve.llm import LLMConfig  # noqa: E402

from quickchange_server.cluster.llm.llm_engine import QuickchangeEngine  # noqa: E402

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
        engine=partial(fake_engine.main, behaviour=behaviour or Behaviour()),
        base=lambda: BASE_SPEC,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()
