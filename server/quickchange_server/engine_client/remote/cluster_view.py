"""What a cluster's replicas say of themselves: plain data, which crosses machines.

Nothing here knows how it is sent, or what the replicas run on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.protocol import Ready

ReplicaKind = Literal["engine", "ingress"]
READY = "ready"  # the state of a replica that takes requests


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica's state. Engines alone have `info`, `residency` and the figures of steps."""

    replica: str  # a short label that stays with it, such as "engine-3f2a1c"
    kind: ReplicaKind
    node: str  # id or name
    state: str  # "starting", READY, "draining", ...
    info: Ready | None = None
    residency: Mapping[str, Residence] = field(default_factory=dict)  # by digest
    running: int = 0  # sequences
    waiting: int = 0
    running_adapters: Collection[str] = ()  # names
    waiting_adapters: Collection[str] = ()
    kv_share: float = 0.0  # of the KV blocks, in use
    step_seconds: float = 0.0  # mean of the latest
    metrics: bytes = b""  # its registry, in the format of observability
    at: float = 0.0  # seconds since 1970

    @property
    def serves(self) -> bool:
        """True for an engine that takes requests."""
        return self.kind == "engine" and self.state == READY


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All replicas that were heard of lately, and the pinned adapter versions.

    `board`: an id of what keeps this; with another id it has begun anew, and lost its pins.
    """

    replicas: tuple[ReplicaReport, ...]
    pins: tuple[str, ...] = ()
    board: str = ""
