"""Loading an adapter on the loader's thread starts no OpenMP team beside the engine's.

With more threads than cores OpenMP stops spinning between parallel regions, and every later step of
the engine is slower, long after the load.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, threading, time
import torch
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

WIDTH = 4096
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)  # the engine's own team
group = ModuleGroup(0, "linear", WIDTH, WIDTH, (Member("m", 0, WIDTH),))
update = LowRankUpdate(torch.ones(64, WIDTH), torch.ones(WIDTH, 64), 1.0)
adapter = CanonicalAdapter("L", "base", {"m": update})
pool = DevicePool([group], 16 << 20, torch.float32, torch.device("cpu"))
before = len(os.listdir("/proc/self/task"))

def load():
    image = build_image(adapter, page_shapes([group], torch.float32), torch.float32)
    pool.write(pool.allocate(image), image)

loader = threading.Thread(target=load)
loader.start()
loader.join()
for _ in range(100):  # the system takes a moment to forget a thread that has ended
    if len(os.listdir("/proc/self/task")) == before:
        break
    time.sleep(0.02)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by Linux's /proc")  # noqa: PTH112
def test_a_load_starts_no_thread_team() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.strip() == "0", "the loader entered a parallel region"
