"""A router of Ray Serve that knows nothing: what affinity is compared with."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RunningReplica

from quickchange_server.cluster.routing.request_router import AdapterRequestRouter


class RandomRequestRouter(AdapterRequestRouter):
    """Any replica, each as likely; counted as the real one's choices are."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        random.shuffle(ranks)
        return ranks
