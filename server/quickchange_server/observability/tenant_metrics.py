"""Metrics of requests and tokens by tenant; tenants' names are bounded as adapters' are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from quickchange_server.frontend.request_observers import Completed
from quickchange_server.observability.naming.labels import OTHER, AdapterLabels


class TenantMetrics:
    """The metrics of tenants; the first `limit` tenants keep a label value of their own."""

    def __init__(self, registry: CollectorRegistry, limit: int, *, shared: bool = False) -> None:
        """`shared`: limits are counted for several replicas."""

        def counter(name: str, text: str, label: str) -> Counter:
            labels = ["tenant", label]
            return Counter(f"quickchange_tenant_{name}", text, labels, registry=registry)

        self._labels = AdapterLabels(limit, reserved=frozenset({OTHER}))
        self._requests = counter("requests_total", "Requests that ended, by how", "outcome")
        self._tokens = counter(
            "tokens_total", "Tokens of prompts and of answers, those of failed requests too", "kind"
        )
        self._limited = counter(
            "limited_total", "Requests refused by a limit of their API key", "limit"
        )
        self._alone = Counter(
            "quickchange_limits_counted_alone_total",
            "Requests whose limits a cluster's replica counted alone: the counter did not answer",
            registry=registry if shared else None,
        )

    def completed(self, completed: Completed) -> None:
        """Count a request that has ended."""
        tenant = self._labels(completed.opened.caller.tenant)
        self._requests.labels(tenant, completed.ending).inc()
        if completed.ending != "refused":
            self._tokens.labels(tenant, "prompt").inc(completed.opened.prompt_tokens)
            self._tokens.labels(tenant, "completion").inc(completed.completion_tokens)

    def limited(self, tenant: str, limit: str) -> None:
        """Count a request that a limit refused."""
        label = self._labels(tenant)
        self._requests.labels(label, "refused").inc()
        self._limited.labels(label, limit).inc()

    def counted_alone(self) -> None:
        """Count a request that the cluster's counter was not there to decide."""
        self._alone.inc()
