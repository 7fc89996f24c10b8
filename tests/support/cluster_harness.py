"""A cluster on this machine's loopback: nodes of ray.cluster_utils, engines over a tiny base.

Everything is ended by the ids of the processes that were started here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

LIMIT_SECONDS = 240.0  # for what takes seconds on a machine that is not busy
# Ray must not take the machine's outer address for its nodes'; it reads this when it is imported.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "120"  # 5 s end proxies of a busy machine
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  # as Ray reads it
os.environ.pop("RAY_ADDRESS", None)
# Workers find the modules of the tests, such as a fake engine, as this process does.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


@dataclass
class LiveCluster:
    """A running application, its address, and what it runs on."""

    url: str
    http: httpx.Client
    settings: Any
    cluster_settings: Any
    nodes: Any  # ray.cluster_utils.Cluster
    name: str = "quickchange"
    engine: Callable[..., None] | None = None
    _spare: list[Any] = field(default_factory=list)

    def redeploy(self, settings: Any = None, *, wait: bool = True, **cluster: Any) -> None:
        """Deploy the application again, which rolls its replicas, with changed ClusterSettings."""
        self.settings = settings or self.settings
        self.cluster_settings = self.cluster_settings.model_copy(update=cluster)
        _deploy(self.settings, self.cluster_settings, self.name, self.engine, wait=wait)

    def replicas(self, deployment: str) -> list[tuple[str, int, str]]:
        """Replica id, process id and node id of each running replica."""
        from ray import serve

        details = serve.context._get_global_client().get_serve_details()
        found = details["applications"][self.name]["deployments"][deployment]["replicas"]
        return [(r["replica_id"], r["pid"], r["node_id"]) for r in found if r["state"] == "RUNNING"]

    def kill(self, deployment: str, index: int = 0) -> int:
        """kill -9 of a replica's actor. Returns its process id."""
        pid = self.replicas(deployment)[index][1]
        os.kill(pid, signal.SIGKILL)
        return pid

    def node_of(self, node_id: str) -> Any:
        """The worker node with this id, for `nodes.remove_node`."""
        return next(node for node in self.nodes.worker_nodes if node.node_id == node_id)

    def wait_for(self, deployment: str, count: int, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until so many replicas run, and no other."""
        wait_until(lambda: len(self.replicas(deployment)) == count, seconds)


def wait_until(condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come about")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def live_cluster(
    model: Path,
    store: str | Path,
    *,
    workers: int = 2,
    worker_cpus: float = 2.0,
    engine: Callable[..., None] | None = None,
    cluster: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[LiveCluster]:
    """A head node for the controller and the proxy, and `workers` nodes for replicas.

    `engine` replaces the engine process's entry; `cluster` changes ClusterSettings.
    """
    import ray
    from ray import serve
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from quickchange_server.cluster.cluster_settings import ClusterSettings
    from quickchange_server.config import Settings

    ray_constants.ENABLE_RAY_CLUSTER = False  # another test may have imported Ray before
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: it has sockets
    port = free_port()
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder  # where the cluster's address is written, too
    nodes = Cluster(shutdown_at_exit=False)
    try:
        nodes.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(workers):
            nodes.add_node(num_cpus=worker_cpus)
        ray.init(address=nodes.address, log_to_driver="RAY_LOGS" in os.environ)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        given = {"threads": 1, "drain_seconds": 10.0, "kv_cache_bytes": 16 * 1024**2, **settings}
        live = LiveCluster(
            f"http://127.0.0.1:{port}",
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_SECONDS),
            Settings(model=str(model), store=store, port=port, **given),
            ClusterSettings(**{"engines": 2, "ingress_cpus": 0.1, **(cluster or {})}),
            nodes,
            engine=engine,
        )
        _deploy(live.settings, live.cluster_settings, live.name, engine)
        with live.http:
            yield live
    finally:
        with contextlib.suppress(Exception):  # a test may have left it without a controller
            serve.shutdown()
        ray.shutdown()
        left = [*nodes.worker_nodes, *filter(None, [nodes.head_node])]
        started = [
            info.process for node in left for infos in node.all_processes.values() for info in infos
        ]
        for node in left:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for process in started:  # else Python warns of each, since Ray doesn't ask how they ended
            process.wait(LIMIT_SECONDS)
        for child in psutil.Process().children(recursive=True):  # of a node that did not come up
            with contextlib.suppress(psutil.Error):
                if folder in " ".join(child.cmdline()):
                    child.kill()
        os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)
        shutil.rmtree(folder, ignore_errors=True)


def _deploy(
    settings: Any, cluster: Any, name: str, engine: Callable[..., None] | None, *, wait: bool = True
) -> None:
    from ray.serve.api import _run

    from quickchange_server.cluster.application import application

    entry = {} if engine is None else {"engine": engine}
    _run(application(settings, cluster, **entry), name=name, route_prefix="/", _blocking=wait)
