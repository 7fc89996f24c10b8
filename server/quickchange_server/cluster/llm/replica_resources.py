"""What one replica takes of the cluster, by Ray Serve LLM's configuration of its model.

A replica is one actor, and its engine's processes are the actor's own: all GPUs of a
tensor-parallel engine belong to the actor, so Ray finds them on one node. Ray is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quickchange_server.cluster.llm.engine_settings import Device
from quickchange_server.errors import SettingError

_OURS = frozenset({"CPU", "GPU", "memory"})


@dataclass(frozen=True)
class ReplicaResources:
    """The device that a replica computes on, and what it takes of the cluster."""

    device: Device
    cpus: float
    gpus: float
    memory: float  # bytes; 0: not counted
    engine_cpus: float  # of `cpus`
    accelerator_type: str | None
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def threads(self) -> int | None:
        """Threads of the engine on a CPU; None on a GPU."""
        return max(1, math.floor(self.engine_cpus)) if self.device == "cpu" else None

    def actor_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Ray's options of the actor: `given` with the resources."""
        options = {**given, "num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.memory:
            options["memory"] = self.memory
        if self.others:
            options["resources"] = dict(self.others)
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        return options


def replica_resources(
    engine_kwargs: Mapping[str, Any],
    *,
    kind: str,
    accelerator_type: str | None,
    placement: Mapping[str, Any] | None,
    actor: Mapping[str, Any],
) -> ReplicaResources:
    """Resources by `accelerator_config.kind`, `placement_group_config` and `ray_actor_options`.

    A placement group's bundles are added up. Raises SettingError, which names the field.
    """
    device = _device(engine_kwargs.get("device"), kind)
    ranks = _ranks(engine_kwargs)
    bundles = _bundles(placement, ranks, device)
    total = dict.fromkeys(_OURS, 0.0)
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + float(amount)
    own_cpus = float(actor.get("num_cpus", 1))
    gpus = total.pop("GPU") + float(actor.get("num_gpus") or 0)
    if device == "cuda" and 0 < gpus < ranks and ranks > 1:
        raise SettingError(
            f"placement_group_config: {gpus:g} GPUs for tensor_parallel_size {ranks}; give one "
            "bundle with a GPU to each",
            param="placement_group_config",
        )
    cpus = total.pop("CPU")
    memory = total.pop("memory") + float(actor.get("memory") or 0)
    for name, amount in (actor.get("resources") or {}).items():
        total[name] = total.get(name, 0.0) + float(amount)
    return ReplicaResources(
        device=device,
        cpus=own_cpus + cpus,
        gpus=gpus if device == "cuda" else 0.0,
        memory=memory,
        engine_cpus=cpus or own_cpus,
        accelerator_type=accelerator_type if device == "cuda" else None,
        others=total,
    )


def _device(wanted: Any, kind: str) -> Device:
    match wanted or kind:
        case "cpu":
            return "cpu"
        case "cuda" | "gpu" | "auto":
            return "cuda"
    raise SettingError(
        f"accelerator_config: {wanted or kind!r} is not served; Quickchange runs on cpu and on gpu",
        param="accelerator_config",
    )


def _ranks(engine_kwargs: Mapping[str, Any]) -> int:
    for name in ("tensor_parallel_size", "tensor_parallel"):
        value = engine_kwargs.get(name)
        if value is not None:
            if not isinstance(value, int) or value < 1:
                raise SettingError(
                    f"engine_kwargs.{name}: must be a whole number of at least 1", param=name
                )
            return value
    return 1


def _bundles(
    placement: Mapping[str, Any] | None, ranks: int, device: Device
) -> list[Mapping[str, float]]:
    if placement is None:
        return [{"GPU": 1.0}] * ranks if device == "cuda" else []
    worker, bundles = placement.get("bundle_per_worker"), placement.get("bundles")
    if (worker is None) == (bundles is None):
        raise SettingError(
            "placement_group_config: give either bundle_per_worker or bundles",
            param="placement_group_config",
        )
    several: list[Any] = [worker] * ranks if bundles is None else list(bundles)
    strategy = placement.get("strategy", "PACK")
    if "SPREAD" in strategy and len(several) > 1:
        raise SettingError(
            f"placement_group_config.strategy: {strategy!r} spreads an engine over nodes, which "
            "Quickchange's tensor parallelism does not; leave it out, or use more replicas",
            param="placement_group_config.strategy",
        )
    return several
