"""For all tests: no hub, float32 on every CPU, and one thread, since small tensors only lose by
more."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QUICKCHANGE_DTYPE"] = "float32"
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["brief_summary", "postgres_server"]
