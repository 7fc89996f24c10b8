"""The fake engine with what makes a fleet's figures move: prefills, prefix hits, preemptions,
and a device tier too small for its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from fake_engine import ADAPTER_BYTES, Behaviour, FakeEngine

from quickchange_server.config import Settings
from quickchange_server.protocol import AdapterMoved, Delta, Ready, StepStats

KV_BLOCKS = 128
HELD = 2  # adapters on the device


@dataclass
class BusyEngine(FakeEngine):
    steps: int = 0

    def load(self, digest: str) -> bool:
        if digest not in self.loaded and len(self.loaded) >= HELD:
            oldest = min(self.loaded)
            self.loaded.discard(oldest)
            self.connection.send(AdapterMoved(oldest, "host", "evict", 0.0, ADAPTER_BYTES))
        return super().load(digest)

    def advance(self, key: str) -> Delta:
        delta = super().advance(key)
        return delta._replace(cached_tokens=1) if delta.cached_tokens == 0 else delta

    def stats(self) -> StepStats:
        self.steps += 1
        stats = super().stats()
        return stats._replace(
            mask_seconds=0.0003,
            rows=stats.rows + stats.draft_rows + 4,
            prefill_rows=4,
            kv_blocks_cached=10,
            prefix_query_tokens=8 * self.steps,
            prefix_hit_tokens=3 * self.steps,
            preemptions=self.steps // 10,
            late_compilations=self.steps // 40,
            late_captures=self.steps // 40,
        )


def main(connection: Connection, settings: Settings, behaviour: Behaviour) -> None:
    """An engine process's entry."""
    connection.send(Ready(2048, KV_BLOCKS, 16, 0.5, 10 * ADAPTER_BYTES, 20 * ADAPTER_BYTES))
    BusyEngine(connection, settings, behaviour).run()
