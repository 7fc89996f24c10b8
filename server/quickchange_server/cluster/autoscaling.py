"""The number of engines that Ray Serve's autoscaler is to run: for what is queued, and its KV.

Serve sends this module to its controller by value and calls it there a few times a second; its own
bounds and delays are applied to the outcome.
"""

from __future__ import annotations

import math
from typing import Any


class EnginesWanted:
    """Serve's autoscaling policy; the targets of an engine are those of ClusterSettings."""

    def __init__(self, queue_target: float, kv_target: float) -> None:
        self._queue_target = queue_target
        self._kv_target = kv_target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of engines, and no state. `context`: Serve's AutoscalingContext."""
        told = context.aggregated_metrics or {}
        # What waits at the ingresses for a free replica is in no engine's queue yet.
        queue = sum(told.get("queue", {}).values()) + (context.total_queued_requests or 0.0)
        kv = sum(told.get("kv_share", {}).values())
        wanted = max(queue / self._queue_target, kv / self._kv_target)
        return max(1, math.ceil(wanted)), {}
