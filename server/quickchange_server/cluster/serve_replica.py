"""What a replica of Ray Serve can know of itself, and what Ray's errors mean to a caller.

The only place that looks inside Serve: it tells a replica that it is to end only by its
destructor, after the last request, and by then nothing can be given back.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.errors import EngineFailedError, QuickchangeError
from quickchange_server.observability.naming.request_ids import log_lines

logger = logging.getLogger(__name__)


def log() -> None:
    """Write this process's log lines as a single server does."""
    log_lines()
    for library in ("httpx", "alembic", "ray"):
        logging.getLogger(library).setLevel(logging.WARNING)


def label() -> str:
    """The replica's own short label, such as "engine-k3v9x2ab"."""
    context: Any = serve.get_replica_context()
    return f"{context.deployment.lower()}-{context.replica_tag}"


def node() -> str:
    """The id of the replica's node."""
    return str(ray.get_runtime_context().get_node_id())


def proxy_host() -> str | None:
    """The address on which Serve's proxies take requests; None if there are none."""
    host: str | None = serve.context._get_global_client().http_config.host
    return host


def is_stopping() -> bool:
    """True once Serve has asked the replica to end: no new request comes, those at work go on."""
    actors: dict[Any, Any] = ray._private.worker.global_worker.actors
    return any(actor._replica_impl._shutting_down for actor in actors.values())


def leave_main_alone() -> None:
    """Have processes that this worker starts not run Ray's worker program again as their
    `__main__`, which would import Ray: seconds of an engine's start."""
    sys.modules["__main__"].__dict__.pop("__file__", None)


def meaning_of(error: BaseException) -> Exception:
    """A call's error as the engine's client knows it.

    What the replica itself raised is raised again; where the replica, its worker or its node is
    gone, or the call never got there, ReplicaLostError.
    """
    cause = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, QuickchangeError | ReplicaLostError):
        return cause
    if isinstance(cause, RayTaskError):
        logger.error("a replica failed within a call", exc_info=cause)
        return EngineFailedError(f"an engine replica failed: {cause}")
    if isinstance(cause, RayError | RayServeException | grpc.RpcError | ConnectionError):
        return ReplicaLostError(str(cause) or type(cause).__name__)
    logger.error("a replica failed within a call", exc_info=cause)
    return EngineFailedError(f"an engine replica failed: {cause!r}")
