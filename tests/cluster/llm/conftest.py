"""`ray.serve.llm`, imported once, with stand-ins for the models of vLLM that it is made of."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

STANDINS = Path(__file__).parents[2] / "support" / "vllm_standins"


def _import() -> None:
    """Import it, and give the root logger back, which it takes over."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    sys.path.append(str(STANDINS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve.llm  # noqa: F401
    root.handlers[:], root.level = before


if find_spec("pyarrow") is not None:  # else the tests that need Ray Serve LLM skip
    _import()
