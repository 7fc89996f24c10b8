"""Replicas that start at once on an empty database: one migrates, all open."""

from __future__ import annotations

import subprocess
import sys

OPEN = """
import asyncio, sys
from quickchange_server.storage.database import Database
sys.stdin.readline()
asyncio.run(Database.open(sys.argv[1]).close())
print("opened")
"""
REPLICAS = 6


def test_replicas_that_start_together_all_open(database_url: str) -> None:
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(REPLICAS)
    ]
    for replica in replicas:
        assert replica.stdin is not None
        replica.stdin.write("\n")
        replica.stdin.flush()
    results = [replica.communicate(timeout=60) for replica in replicas]
    assert [out for out, _ in results] == ["opened\n"] * REPLICAS, [err for _, err in results]
