"""The command `quickchange cluster`: joins Ray or starts it, deploys the application, watches it.

Ray is imported here only once the command runs, after what it reads from the environment is set.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quickchange_server.cluster.cluster_settings import (
    ApplicationArguments,
    ClusterSettings,
    for_replicas,
)
from quickchange_server.config import Settings, is_loopback
from quickchange_server.entrypoints.http_server import KEEP_ALIVE_SECONDS, bind
from quickchange_server.entrypoints.serve import check_access, fail, say, settings_of
from quickchange_server.errors import EngineFailedError, QuickchangeError, SettingError
from quickchange_server.observability.naming.request_ids import log_lines
from quickchange_server.storage import database
from quickchange_server.storage.database_engines import provisional
from quickchange_store.errors import StoreError
from quickchange_store.hub_access import look_for_hub

NAME = "quickchange"  # of the application
LOOK_SECONDS = 1.0  # between looks at the replicas
OBJECT_STORE_BYTES = 512 * 1024**2  # of a Ray that is started here; only uploads are objects
_ERROR = re.compile(r"(RuntimeError: )?(ray\.\S+: )*(\w+\.)*\w+(Error|Exception): ")
LAST_SECONDS = 20.0  # for everything to end, once the requests have

logger = logging.getLogger(__name__)


def cluster(given: Mapping[str, Any], *, detach: bool) -> None:
    """Serve on a cluster until a signal ends it, with the settings `given` on the command line.

    detach: with RAY_ADDRESS, return once the application runs, and leave it there. Exits with
    status 1 and one line of error if it can't.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    log_lines()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    arguments = settings_of(given, ApplicationArguments)
    settings, cluster_settings = arguments.parts
    address = os.environ.get("RAY_ADDRESS")
    try:
        _check(settings, cluster_settings)
        if detach and not address:
            raise SettingError(
                "--detach: there is no Ray to leave the application on; give its address in "
                "RAY_ADDRESS, or leave --detach out"
            )
        with provisional(settings.database_url) as keep_database:
            database.check(settings.database_url)
            check_access(settings)
            with _ray(settings, cluster_settings, address, detach=detach) as started:
                settings, url = started
                say("deploying: each engine loads the model and measures its steps")
                _deploy(settings, cluster_settings)
                keep_database()
                print(f"Quickchange is ready on {url} ({_summary()})", flush=True)
                if not detach:
                    _watch()
    except (QuickchangeError, StoreError) as error:
        fail(str(error))


def _check(settings: Settings, cluster_settings: ClusterSettings) -> None:
    for_replicas(settings, cluster_settings, cpus=1)
    look_for_hub(settings.model)


@contextlib.contextmanager
def _ray(
    settings: Settings, cluster_settings: ClusterSettings, address: str | None, *, detach: bool
) -> Iterator[tuple[Settings, str]]:
    """Ray with Serve, joined or started: the settings with what is known now, and the URL.

    At the end what was started is ended, and the application removed from a Ray that was joined,
    unless it is to stay there.
    """
    _prepare_environment(settings, joins=bool(address))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        if address:
            say(f"joining Ray at {address}")
            _join(address)
        else:
            say("starting Ray on this machine")
            settings = _start(settings, cluster_settings, stack)
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray has put its own there
        if not detach:
            stack.callback(_end, settings.drain_seconds, whole=not address)
        yield settings, _serve_http(settings)


def _prepare_environment(settings: Settings, *, joins: bool) -> None:
    """Set what Ray reads when it is imported. Its token authentication stays as it has it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Serve ends a proxy that takes longer to start, by default 5 s, which a busy machine exceeds.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    if not joins and is_loopback(settings.host):
        # Ray takes the machine's outer address even where it is given 127.0.0.1, but for this.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise SettingError(f"RAY_ADDRESS: can't join Ray at {address}: {error}") from error


def _start(
    settings: Settings, cluster_settings: ClusterSettings, stack: contextlib.ExitStack
) -> Settings:
    """Start Ray on this machine. Returns the settings with a port that is free, and threads."""
    import ray

    with bind(settings) as listener:
        port = listener.getsockname()[1]
    cores = os.cpu_count() or 1
    threads = settings.threads or max(1, cores // cluster_settings.most_engines)
    settings = settings.model_copy(update={"port": port, "threads": threads})
    folder = tempfile.mkdtemp(prefix="quickchange-")  # only its owner reads it
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    stack.callback(ray.shutdown)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(cores, _cpus_reserved(settings, cluster_settings)),
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=folder,
            _node_ip_address=settings.host if _is_address(settings.host) else None,
        )
    except Exception as error:  # of whatever kind: Ray raises a bare one where it is too slow
        raise EngineFailedError(f"Ray could not be started: {error}; try again") from error
    _protect_token()
    return settings


def _is_address(host: str) -> bool:
    """True for an address of this machine, which Ray can take for its own."""
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _cpus_reserved(settings: Settings, cluster_settings: ClusterSettings) -> int:
    """CPUs that all replicas reserve in Ray's books, with those of a rolling upgrade."""
    from quickchange_server.cluster.application import engine_resources

    engines, ingresses = cluster_settings.most_engines, cluster_settings.ingresses
    share = 1 + cluster_settings.surge_percent / 100
    of_engines = (
        math.ceil(share * engines) * engine_resources(settings, cluster_settings)["num_cpus"]
    )
    of_ingresses = math.ceil(2 * ingresses) * cluster_settings.ingress_cpus
    return math.ceil(of_engines + of_ingresses)


def _protect_token() -> None:
    """Let only its owner read the token file that Ray has made, by which anyone could use Ray."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(named) if named else Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # it may be given in the environment, or be another's
        token.chmod(0o600)


def _serve_http(settings: Settings) -> str:
    """Start Serve, where it doesn't run yet. Returns the URL."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": settings.host,
            "port": settings.port,
            "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
        },
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    options = serve.context._get_global_client().http_config
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{options.port}"


def _deploy(settings: Settings, cluster_settings: ClusterSettings) -> None:
    """Deploy, and wait until all replicas run. Raises EngineFailedError with the first reason."""
    from ray import serve
    from ray.serve.api import RunTarget

    from quickchange_server.cluster.application import application

    target = RunTarget(application(settings, cluster_settings), name=NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    while True:
        found = serve.status().applications.get(NAME)
        if found is not None:
            if found.status == "RUNNING":
                return
            if found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [found.message, *(d.message for d in found.deployments.values())]
                raise EngineFailedError(f"the application can't run: {reason_of(messages)}")
        time.sleep(LOOK_SECONDS)


def reason_of(messages: Iterable[str]) -> str:
    """The error at the end of the last traceback in what Serve says."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return _ERROR.sub("", errors[-1]) if errors else lines[-1] if lines else "no reason was given"


def _replicas() -> dict[str, str]:
    """The state of each replica, by its label."""
    from ray import serve

    details = serve.context._get_global_client().get_serve_details()
    deployments = details["applications"].get(NAME, {}).get("deployments", {})
    return {
        f"{name.lower()}-{replica['replica_id']}": replica["state"].value
        for name, deployment in deployments.items()
        for replica in deployment["replicas"]
    }


def _summary() -> str:
    """The cluster on one line."""
    import ray

    running = [label for label, state in _replicas().items() if state == "RUNNING"]
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    counts = [
        (sum(label.startswith("engine-") for label in running), "engine", "engines"),
        (sum(label.startswith("ingress-") for label in running), "ingress", "ingresses"),
        (nodes, "node", "nodes"),
    ]
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)


def _watch() -> None:
    """Log what becomes of replicas, for ever."""
    known = _replicas()
    while True:
        time.sleep(LOOK_SECONDS)
        now = _replicas()
        for label in sorted(known.keys() | now.keys()):
            before, after = known.get(label), now.get(label, "gone")
            if before != after:
                logger.info("%s: %s", label, after.lower())
        if known != now:
            logger.info("now %s", _summary())
        known = now


def _end(drain_seconds: float, *, whole: bool) -> None:
    """Remove the application, for which running requests have `drain_seconds`; a second signal
    ends all at once. whole: Serve and Ray end with it."""
    from ray import serve

    say("ending: running requests go on for a while")
    if not whole:
        serve.delete(NAME, _blocking=False)
        return
    ending = threading.Thread(target=serve.shutdown, name="serve-shutdown", daemon=True)
    ending.start()
    ending.join(drain_seconds + LAST_SECONDS)
    if ending.is_alive():
        logger.warning("requests cut off by the end of the cluster")
