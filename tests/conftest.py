"""For all tests: no hub, float32 on every CPU, and one thread, since small tensors only lose by
more. Of what takes long: what engines import is imported once, and the longest files come first."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QUICKCHANGE_DTYPE"] = "float32"
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["brief_summary", "postgres_server"]

# Files of half a minute and more, the longest first: one that is started last runs on one core.
LONG = (
    "tests/triton_kernels/test_engine_under_interpreter.py",
    "tests/kernels/test_ptx_shipped_kernels.py",
    "tests/benchmarks/test_sweep.py",
    "tests/entrypoints/test_cli_serve.py",
    "tests/api/openapi/test_numbers_at_extremes.py",
    "tests/spec_decode/test_speculation_pays.py",
    "tests/engine/test_sequence_faults.py",
    "tests/training/test_training_lora.py",
    "tests/engine_client/test_client_streams.py",
)
# What the processes that tests start need, imported in the one from which they are forked. Without
# it each imports torch and transformers anew.
PRELOADED = [
    "fake_engine",
    "quickchange_server.engine.process",
    "quickchange_server.structured_output.grammar",
    "quickchange_bench.architectures.sweep_case",
    "transformers.models.auto.modeling_auto",
]
if sys.platform == "linux":
    of_one_file = "PYTEST_XDIST_WORKER" not in os.environ  # may need no model at all
    multiprocessing.set_forkserver_preload(PRELOADED[:1] if of_one_file else PRELOADED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; `--no-loadscope-reorder` leaves it so."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))
