"""OpenTelemetry traces: one span for each request, sent by OTLP over HTTP.

Attributes have the names of the GenAI semantic conventions, or else start with `quickchange.`. A
client's `traceparent` makes the span a child of the client's, and suppresses it if unsampled.
Spans are made when a request has ended, and sent in batches by a separate thread. This module
needs the extra `traces` and is imported only if the setting `otlp_endpoint` is given.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from quickchange_server.errors import SettingError
from quickchange_server.frontend.request_observers import Completed, Opened
from quickchange_server.observability.gateways.genai_metrics import (
    PROVIDER,
    UNSPECIFIED,
    operation,
    response_model,
)
from quickchange_server.protocol import SamplingParams

PATH = "/v1/traces"
SEND_SECONDS = 5.0  # for one batch, retries included
BATCH_SECONDS = 1.0  # until a span is sent at the latest
MICROSECOND = 1000  # nanoseconds; Unix time as a float has no finer resolution


class Traces:
    """Request observer that makes spans."""

    def __init__(self, address: str, version: str) -> None:
        """`address`: the URL that spans are posted to."""
        exporter = OTLPSpanExporter(endpoint=address, timeout=SEND_SECONDS)
        resource = Resource.create({SERVICE_NAME: "quickchange", SERVICE_VERSION: version})
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_SECONDS * 1000)
        )
        self._tracer = self._provider.get_tracer("quickchange", version)
        self._propagator = TraceContextTextMapPropagator()

    def opened(self, opened: Opened) -> None:
        """Do nothing: the span is made when the request has ended."""

    def completed(self, completed: Completed) -> None:
        """Make the request's span; it is sent later, on another thread."""
        opened = completed.opened
        carrier = {} if opened.traceparent is None else {"traceparent": opened.traceparent}
        began = _nanoseconds(opened.at)
        span = self._tracer.start_span(
            f"{operation(opened)} {opened.model}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=began,
            attributes=attributes_of(completed),
        )
        for event, after in (
            ("quickchange.first_step", completed.queue_seconds),
            ("quickchange.first_token", completed.first_token_seconds),
        ):
            if after:
                span.add_event(event, timestamp=began + _nanoseconds(after))
        if completed.ending == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end(began + _nanoseconds(completed.seconds))

    async def close(self) -> None:
        """Send the remaining spans and end the thread."""
        await asyncio.to_thread(self._provider.shutdown)


def address(endpoint: str) -> str:
    """The URL that spans are posted to: `endpoint`, with OTLP's path if it has none.

    Raises SettingError if it is not an HTTP URL.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingError(
            f"otlp_endpoint: {endpoint!r} is not the address of a collector; give one such as "
            "http://127.0.0.1:4318 (OTLP over HTTP)",
            param="otlp_endpoint",
        )
    return endpoint.rstrip("/") + PATH if parts.path in ("", "/") else endpoint


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e6) * MICROSECOND


def attributes_of(completed: Completed) -> dict[str, AttributeValue]:
    """The attributes of a request's span."""
    opened = completed.opened
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation(opened),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": opened.model,
        "gen_ai.request.max_tokens": opened.max_tokens,
        "gen_ai.request.choice.count": opened.choices,
        "gen_ai.request.stream": opened.streamed,
        "gen_ai.response.id": opened.request_id,
        "gen_ai.response.model": response_model(opened),
        "gen_ai.usage.input_tokens": opened.prompt_tokens,
        "gen_ai.usage.output_tokens": completed.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": completed.cached_tokens,
        "quickchange.adapter": opened.label,
        "quickchange.adapter.digests": opened.digests,
        "quickchange.request_id": opened.http_id,
        "quickchange.tenant": opened.caller.tenant,
        "quickchange.drafted_tokens": completed.drafted_tokens,
        "quickchange.accepted_tokens": completed.accepted_tokens,
        "quickchange.ending": completed.ending,
    }
    if opened.sampling is not None:
        attributes |= _sampling(opened.sampling)
    if completed.ending in ("stop", "length"):
        attributes["gen_ai.response.finish_reasons"] = (completed.ending,)
    if completed.ending == "failed":
        attributes["error.type"] = UNSPECIFIED
    if completed.first_token_seconds is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = completed.first_token_seconds
    if opened.assignment is not None:
        attributes |= {
            "quickchange.experiment": opened.assignment.experiment,
            "quickchange.variant": opened.assignment.variant,
        }
    return attributes


def _sampling(sampling: SamplingParams) -> dict[str, AttributeValue]:
    """What the client chose, or the defaults; without stop strings, which are its own text."""
    chosen: dict[str, AttributeValue] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.seed is not None:
        chosen["gen_ai.request.seed"] = sampling.seed
    return chosen
