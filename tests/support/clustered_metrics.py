"""The metrics of a server as a cluster of an ingress and engine replicas would tell them.

The ingress and the first engine replica read the server's own registry, so that everything that
happens there shows on both sides; a second engine replica only fetches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cluster_support import FakeCluster, Replica
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from quickchange_server.api.app_state import Services
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.observability.cluster_metrics import (
    Cluster,
    IngressCollector,
    StreamMetrics,
    exposition_of_all,
)
from quickchange_server.observability.replica_metrics import snapshot


class _Both(Collector):
    """A server's registry, and what it would have besides as an ingress."""

    def __init__(self, *parts: CollectorRegistry) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        for part in self._parts:
            yield from part.collect()


class Clustered:
    """One server as a cluster."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._busy, self._idle = Replica("engine-busy"), Replica("engine-idle")
        fake = FakeCluster(own="ingress-own", wanted=2)
        self._cluster = Cluster("ingress-own", self._view, fake.seen.wanted, self._routed)
        self._asked = 0
        self._own, self._streams = CollectorRegistry(), StreamMetrics()
        self._streams.register(self._own)
        Counter("quickchange_limits_counted_alone", "Of limits", registry=self._own)
        self._own.register(IngressCollector(lambda: services.client.in_flight, self._cluster))

    def exposition(self) -> bytes:
        self._streams.resumed("lost", 0.3)
        self._idle.fetch("d")  # which the fake engine never does
        registry = _Both(self._services.metrics.registry, self._own)
        return exposition_of_all(registry, self._cluster, lambda digest: digest[:8])

    def _view(self) -> ClusterView:
        busy = replace(
            self._busy.report(),
            residency=self._services.client.residency.snapshot(),
            metrics=snapshot(self._services.metrics.registry, "engine-busy", "engine"),
        )
        return ClusterView((busy, self._idle.report()))

    def _routed(self) -> dict[str, int]:
        self._asked += 1
        return {"device": 90 * self._asked, "loading": 5, "host": 3, "disk": 2 * self._asked}


@contextmanager
def clustered(services: Services) -> Iterator[tuple[Clustered, str]]:
    """Serve it at /metrics of an address of its own."""
    told = Clustered(services)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = told.exposition()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # it stopped scraping meanwhile
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield told, f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
