"""Spans of a live server's requests, as a collector gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter, make_turbo, wait_until
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes
from otlp_receiver import Received, collector, plain

from quickchange_server.config import Settings
from quickchange_server.entrypoints.app import create_app
from quickchange_server.errors import SettingError
from quickchange_server.frontend.caller import ANYONE
from quickchange_server.frontend.request_observers import Assignment, Completed, Opened
from quickchange_server.observability.tracing import Traces, address
from quickchange_server.protocol import SamplingParams
from quickchange_store.store import Store

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"
OPENED = Opened(
    "cmpl-1",
    ANYONE,
    "canary",
    "orders",
    7,
    20,
    2,
    at=1_700_000_000.25,
    digests=("a" * 64,),
    sampling=SamplingParams(seed=1),
)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Received]]:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    store.add("orders", make_adapter(1.0))
    store.add("fast", make_turbo(2.0, lora=True))
    store.add("missing", make_adapter(3.0))
    digest = store.resolve("missing").digest
    behaviour = Behaviour(missing=frozenset({digest}))
    with (
        collector() as received,
        live_server(folder, behaviour, otlp_endpoint=received.url) as live,
    ):
        yield live, received


def span_of(received: Received, request_id: str) -> tuple[Span, dict[str, Any]]:
    """A request's span and its attributes, once they have come."""

    def found() -> list[tuple[Span, dict[str, Any]]]:
        spans = [(span, plain(span.attributes)) for span in list(received.spans)]
        return [s for s in spans if s[1]["gen_ai.response.id"] == request_id]

    wait_until(lambda: bool(found()))
    (span,) = found()
    return span


def test_a_completion_is_one_span_with_its_adapter_and_tokens(
    traced: tuple[Live, Received],
) -> None:
    live, received = traced
    body = {"model": "orders", "prompt": "abcde", "max_tokens": 6, "n": 2}
    body |= {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": 3, "stop": ["secret"]}
    headers = {"x-request-id": "edge:7f3a"}
    sent = live.http.post("/v1/completions", json=body, headers=headers)
    answer, digest = sent.json(), live.store.resolve("orders").digest
    assert sent.headers["x-quickchange-adapter"] == digest
    span, attributes = span_of(received, answer["id"])
    assert span.name == "text_completion orders"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.parent_span_id == b""
    first = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < first <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "quickchange",
        "gen_ai.request.model": "orders",
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": f"orders@{digest[:12]}",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "quickchange.adapter": "orders",
        "quickchange.adapter.digests": [digest],
        "quickchange.request_id": "edge:7f3a",
        "quickchange.tenant": "default",
        "quickchange.drafted_tokens": 0,
        "quickchange.accepted_tokens": 0,
        "quickchange.ending": "length",
    }
    step, token = span.events
    assert (step.name, token.name) == ("quickchange.first_step", "quickchange.first_token")
    assert step.time_unix_nano - span.start_time_unix_nano == 1_000_000  # as the engine says
    assert span.start_time_unix_nano < token.time_unix_nano <= span.end_time_unix_nano
    assert received.paths[0] == "/v1/traces"
    assert received.resources[0]["service.name"] == "quickchange"


def test_a_chat_with_turbo_tells_what_was_drafted_and_accepted(
    traced: tuple[Live, Received],
) -> None:
    live, received = traced
    body = {"model": "fast", "prompt": "ab", "max_tokens": 20, "stream": True, "seed": 1}
    body["stream_options"] = {"include_usage": True}
    events = live.events("/v1/completions", body)
    usage = events[-2]["usage"]["completion_tokens_details"]
    _, attributes = span_of(received, events[0]["id"])
    accepted = usage["accepted_prediction_tokens"]
    assert attributes["quickchange.accepted_tokens"] == accepted > 0
    drafted = accepted + usage["rejected_prediction_tokens"]
    assert attributes["quickchange.drafted_tokens"] == drafted


def test_a_span_is_a_child_of_the_clients(traced: tuple[Live, Received]) -> None:
    live, received = traced
    body = {"model": BASE, "prompt": "ab", "max_tokens": 2}
    headers = {"traceparent": PARENT}
    answer = live.http.post("/v1/completions", json=body, headers=headers).json()
    span, _ = span_of(received, answer["id"])
    assert span.trace_id.hex() == PARENT.split("-")[1]
    assert span.parent_span_id.hex() == PARENT.split("-")[2]


def test_a_client_that_samples_nothing_gets_no_span(traced: tuple[Live, Received]) -> None:
    live, received = traced
    body = {"model": BASE, "prompt": "ab", "max_tokens": 2}
    headers = {"traceparent": UNSAMPLED}
    silent = live.http.post("/v1/completions", json=body, headers=headers).json()["id"]
    span_of(received, live.post("/v1/completions", body).json()["id"])  # batches keep the order
    assert silent not in {plain(span.attributes)["gen_ai.response.id"] for span in received.spans}


def test_a_broken_traceparent_is_as_none(traced: tuple[Live, Received]) -> None:
    live, received = traced
    body = {"model": BASE, "prompt": "ab", "max_tokens": 2}
    headers = {"traceparent": "00-nonsense"}
    answer = live.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200
    span, _ = span_of(received, answer.json()["id"])
    assert span.parent_span_id == b""


def test_a_request_that_fails_is_an_error_in_its_span(traced: tuple[Live, Received]) -> None:
    live, received = traced
    before = len(received.spans)
    body = {"model": "missing", "prompt": "ab", "max_tokens": 2}
    assert live.post("/v1/completions", body).status_code == 424
    wait_until(lambda: len(received.spans) > before)
    span = received.spans[-1]
    assert span.status.code == Status.STATUS_CODE_ERROR
    attributes = plain(span.attributes)
    assert attributes["quickchange.ending"] == "failed"
    assert attributes["error.type"] == "_OTHER"
    assert attributes["gen_ai.usage.output_tokens"] == 0


async def record(url: str, *completed: Completed) -> None:
    traces = Traces(address(url), "1")
    for one in completed:
        traces.opened(one.opened)
        traces.completed(one)
    await traces.close()


def run(url: str, *completed: Completed) -> None:
    asyncio.run(record(url, *completed))


def test_what_was_recorded_is_sent_before_the_end_with_its_times() -> None:
    with collector() as received:
        run(received.url, Completed(OPENED, "stop", 9, 3, 4, 2, 0.5, 2.25))
    (span,) = received.spans
    assert span.start_time_unix_nano == 1_700_000_000_250_000_000
    assert span.end_time_unix_nano - span.start_time_unix_nano == 2_250_000_000
    assert span.events[0].time_unix_nano - span.start_time_unix_nano == 500_000_000


def test_an_experiments_variant_is_told() -> None:
    assignment = Assignment("tone", "b", "u", "hash")
    opened = replace(OPENED, request_id="chatcmpl-1", assignment=assignment)
    with collector() as received:
        run(received.url, Completed(opened, "cancelled"))
    attributes = plain(received.spans[0].attributes)
    assert received.spans[0].name == "chat canary"
    told = {key: attributes.get(f"quickchange.{key}") for key in ("experiment", "variant")}
    assert told == {"experiment": "tone", "variant": "b"}
    assert "gen_ai.response.finish_reasons" not in attributes
    assert not received.spans[0].events


def test_a_collector_that_is_away_costs_no_error() -> None:
    with collector() as received:
        url = received.url
    run(url, Completed(OPENED, "stop"))


def test_attributes_have_the_conventions_names() -> None:
    conventions = {
        value
        for module in (gen_ai_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    with collector() as received:
        run(received.url, Completed(OPENED, "stop", 9, 3, 4, 2, 0.5), Completed(OPENED, "failed"))
    names = {name for span in received.spans for name in plain(span.attributes)}
    assert names >= {"gen_ai.request.model", "error.type", "quickchange.adapter"}
    assert {name for name in names if not name.startswith("quickchange.")} <= conventions


@pytest.mark.parametrize(
    ("endpoint", "posted"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c/", "https://c/v1/traces"),
        ("http://c:4318/otlp/v1/traces", "http://c:4318/otlp/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_otlps(endpoint: str, posted: str) -> None:
    assert address(endpoint) == posted


@pytest.mark.parametrize("endpoint", ["collector:4318", "", "grpc://c:4317", "http://"])
def test_an_endpoint_that_is_no_address_is_refused_by_the_settings_name(
    endpoint: str, tmp_path: Path
) -> None:
    settings = Settings(model="unused", store=tmp_path, otlp_endpoint=endpoint)
    with pytest.raises(SettingError, match=r"otlp_endpoint: .*4318") as raised:
        create_app(settings, text=object())  # type: ignore[arg-type]
    assert raised.value.param == "otlp_endpoint"


def test_without_the_extra_the_setting_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "quickchange_server.observability.tracing")
    monkeypatch.delattr("quickchange_server.observability.tracing", raising=False)
    settings = Settings(model="unused", store=tmp_path, otlp_endpoint="http://c:4318")
    with pytest.raises(SettingError, match=r"otlp_endpoint: .*quickchange\[traces\]"):
        create_app(settings, text=object())  # type: ignore[arg-type]


def test_without_the_setting_no_exporter_is_imported() -> None:
    program = """
import sys, quickchange_server.entrypoints.serve
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exp"))])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
