"""Metrics by the GenAI semantic conventions of OpenTelemetry, in Prometheus' spelling.

A name's dots become underscores and its unit its last part, as a collector translates OTLP:
`gen_ai.server.request.duration` is `gen_ai_server_request_duration_seconds`. The buckets are those
that the conventions ask for. What traces and metrics share of the conventions is here too.
"""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Histogram

from quickchange_server.frontend.request_observers import Completed, Opened
from quickchange_server.observability.naming.labels import AdapterLabels

PROVIDER = "quickchange"  # gen_ai.provider.name
UNSPECIFIED = "_OTHER"  # error.type of an error that the conventions have no name for
DURATION_BUCKETS = tuple(0.01 * 2**i for i in range(14))
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
USAGE_BUCKETS = tuple(4**i for i in range(14))
_OPERATIONS = {  # by the prefix of the answer's id
    "chatcmpl": "chat",
    "resp": "chat",
    "msg": "chat",
    **dict.fromkeys(("embd", "pooling", "classify", "score", "rerank"), "embeddings"),
    "pool": "embeddings",
    "score": "embeddings",
    "rerank": "embeddings",
    "classify": "embeddings",
}
_DIGITS = 12  # of a digest in a model's name: enough for a reference that the store resolves


def operation(opened: Opened) -> str:
    """The conventions' name of what the request asks for."""
    return _OPERATIONS.get(re.split("[-_]", opened.request_id)[0], "text_completion")


def response_model(opened: Opened) -> str:
    """What answered: an adapter's version as a reference to it, or the model that was asked."""
    if len(opened.digests) != 1:
        return opened.model
    return f"{opened.label}@{opened.digests[0][:_DIGITS]}"


class GenAiMetrics:
    """Bookkeeper of the conventions' metrics; the first `limit` models keep their names."""

    def __init__(self, registry: CollectorRegistry, limit: int) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...], *more: str) -> Histogram:
            labels = ["operation_name", "provider_name", "request_model"]
            named = [f"gen_ai_{label}" for label in labels]
            return Histogram(
                f"gen_ai_{name}", text, [*named, *more], buckets=buckets, registry=registry
            )

        self._labels = AdapterLabels(limit, reserved=frozenset())
        self._duration = histogram(
            "server_request_duration_seconds",
            "From a request to its end",
            DURATION_BUCKETS,
            "error_type",
        )
        self._first_token = histogram(
            "server_time_to_first_token_seconds",
            "From a request to its first token",
            FIRST_TOKEN_BUCKETS,
        )
        self._per_token = histogram(
            "server_time_per_output_token_seconds",
            "Time of a token after the first one, of all choices",
            TOKEN_BUCKETS,
        )
        self._usage = histogram(
            "client_token_usage", "Tokens of a request", USAGE_BUCKETS, "gen_ai_token_type"
        )

    def opened(self, opened: Opened) -> None:
        """Do nothing: a request is counted at its end."""

    def completed(self, completed: Completed) -> None:
        """Count an ended request; one that was refused has used nothing."""
        opened = completed.opened
        of = (operation(opened), PROVIDER, self._labels(opened.model))
        error = UNSPECIFIED if completed.ending in ("failed", "refused") else ""
        self._duration.labels(*of, error).observe(completed.seconds)
        if completed.ending == "refused":
            return
        self._usage.labels(*of, "input").observe(opened.prompt_tokens)
        if of[0] != "embeddings":
            self._usage.labels(*of, "output").observe(completed.completion_tokens)
        first = completed.first_token_seconds
        if first is None or error:
            return
        self._first_token.labels(*of).observe(first)
        others = completed.completion_tokens - opened.choices
        if others > 0:
            self._per_token.labels(*of).observe((completed.seconds - first) / others)
