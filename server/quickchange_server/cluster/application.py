"""The application of Ray Serve: the deployments `Ingress`, `Engine` and `Board`.

`serve run quickchange_server.cluster.application:build model=DIR store=URL engines=2`, the same
with `serve deploy` and KubeRay's RayService; `quickchange cluster` deploys it too.
"""

from __future__ import annotations

import hashlib
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from quickchange_server.cluster.autoscaling import EnginesWanted
from quickchange_server.cluster.board import BoardServer
from quickchange_server.cluster.cluster_settings import (
    ApplicationArguments,
    ClusterSettings,
    check_database,
    for_replicas,
)
from quickchange_server.cluster.engine_deployment import EngineReplica
from quickchange_server.cluster.ingress_deployment import IngressReplica
from quickchange_server.cluster.routing.request_router import AdapterRequestRouter
from quickchange_server.config import Settings
from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.entrypoints.engine_start import engine_main

ROUTING_STATS_SECONDS = 0.5
HEALTH_SECONDS = 2.0  # between health checks, of which Serve wants three to fail
HEALTH_ANSWER_SECONDS = 10.0
END_SECONDS = 15.0  # for a replica to end, once its requests have
TRIES = 3  # of a start that fails, most often for a setting or the model, which don't change
_PACKAGES = ("quickchange_server", "quickchange_store", "quickchange_kernels")
MANY = 100_000  # requests at once that no replica reaches: others bound them

_LOGGING = LoggingConfig(
    log_level="WARNING", enable_access_log=False
)  # a line per call takes CPU from the engines


def build(arguments: dict[str, Any]) -> Any:
    """The application, as Serve's command line and configuration files build it.

    Serve reads annotations as they are, and finds no class in a string; so it is given the words.
    `serve run` builds before it joins Ray.
    """
    settings, cluster = ApplicationArguments(**arguments).parts
    if not ray.is_initialized():
        ray.init()
    return application(settings, cluster)


def application(
    settings: Settings, cluster: ClusterSettings, *, engine: EngineMain = engine_main
) -> Any:
    """The application. Ray must have been joined. `engine`: the engine process's entry.

    Raises SettingError where the settings make no sense on this cluster.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    check_database(settings, machines=len(machines))
    settings = for_replicas(settings, cluster, cpus=ray.cluster_resources().get("CPU", 1.0))
    given = settings.model_dump_json()
    board = _as(_board(), "").bind()
    engines = _as(_engine(settings, cluster), f"{given} {engine!r}").bind(settings, board, engine)
    return _as(_ingress(settings, cluster), given).bind(settings, engines, board)


def _as(deployment: Any, given: str) -> Any:
    """The deployment, whose replicas are started anew if they were given something else, or another
    program: Serve's own versions are new each time, so that more replicas would replace all."""
    program = [version("quickchange"), *map(_changed, _PACKAGES)]
    told = hashlib.sha256(f"{program} {given}".encode()).hexdigest()
    return deployment.options(version=told, _internal=True)


def _changed(package: str) -> int:
    """When a file of a package was last changed."""
    (folder,) = importlib.import_module(package).__path__
    return max(file.stat().st_mtime_ns for file in Path(folder).rglob("*.py"))


def _board() -> Any:
    return _deployment(
        BoardServer,
        "Board",
        num_replicas=1,
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=END_SECONDS,
    )


def _engine(settings: Settings, cluster: ClusterSettings) -> Any:
    return _deployment(
        EngineReplica,
        "Engine",
        **_scaling(cluster),
        max_ongoing_requests=settings.max_queue,  # more wait at their ingress
        ray_actor_options=engine_resources(settings, cluster),
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRequestRouter,
            request_routing_stats_period_s=ROUTING_STATS_SECONDS,
        ),
        graceful_shutdown_timeout_s=settings.drain_seconds + END_SECONDS,
        max_surge_percent=cluster.surge_percent,
        max_constructor_retry_count=TRIES,
    )


def _ingress(settings: Settings, cluster: ClusterSettings) -> Any:
    return _deployment(
        serve.ingress()(IngressReplica),
        "Ingress",
        num_replicas=cluster.ingresses,
        user_config={"engines": cluster.engines},
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": cluster.ingress_cpus},
        graceful_shutdown_timeout_s=max(cluster.ingress_drain_seconds, settings.drain_seconds)
        + END_SECONDS,
        max_surge_percent=max(1, cluster.surge_percent),  # needs no GPU
    )


def _deployment(user_class: type, name: str, **options: Any) -> Any:
    return serve.deployment(
        name=name,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_ANSWER_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_LOGGING,
        **options,
    )(user_class)


def _scaling(cluster: ClusterSettings) -> dict[str, Any]:
    if cluster.most_engines == cluster.engines:
        return {"num_replicas": cluster.engines}
    policy = AutoscalingPolicy(
        policy_function=EnginesWanted,
        policy_kwargs={"queue_target": cluster.queue_target, "kv_target": cluster.kv_target},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=cluster.engines,
            initial_replicas=cluster.engines,
            max_replicas=cluster.most_engines,
            upscale_delay_s=cluster.upscale_seconds,
            downscale_delay_s=cluster.downscale_seconds,
            look_back_period_s=max(2.0, min(10.0, cluster.upscale_seconds)),
            policy=policy,
        )
    }


def engine_resources(settings: Settings, cluster: ClusterSettings) -> dict[str, float]:
    """What an engine's actor reserves: its ranks are its child processes, so all GPUs are of one
    node."""
    if settings.device == "cuda":
        cpus = 1.0 if cluster.engine_cpus is None else cluster.engine_cpus
        return {"num_cpus": cpus, "num_gpus": settings.tensor_parallel}
    threads = float(settings.threads or 1)
    return {"num_cpus": threads if cluster.engine_cpus is None else cluster.engine_cpus}
