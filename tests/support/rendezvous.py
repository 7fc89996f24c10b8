"""The order of replicas for an adapter where loads and tiers are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from quickchange_server.cluster.routing.placement import ReplicaCandidate, order


def rendezvous(replicas: Sequence[str], digests: Sequence[str]) -> list[str]:
    return order([ReplicaCandidate(name) for name in replicas], digests)
