"""OpenTelemetry's metrics for generative AI, against the conventions' own names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from http_support import BASE, live_server, make_adapter
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from quickchange_server.frontend.caller import ANYONE
from quickchange_server.frontend.request_observers import Completed, Opened
from quickchange_server.observability.gateways.genai_metrics import (
    GenAiMetrics,
    operation,
    response_model,
)
from quickchange_server.observability.replica_metrics import told_by
from quickchange_store.store import Store

OPENED = Opened("chatcmpl-1", ANYONE, "canary", "orders", 7, 20, 2, at=0.0, digests=("ab" * 32,))
DONE = Completed(OPENED, "stop", 12, first_token_seconds=0.5, seconds=2.5)
UNITS = {"s": "_seconds", "{token}": ""}  # as Prometheus' translation of OTLP has them


def told(*completed: Completed, limit: int = 10) -> dict[str, Metric]:
    registry = CollectorRegistry()
    metrics = GenAiMetrics(registry, limit)
    for one in completed:
        metrics.opened(one.opened)
        metrics.completed(one)
    return {family.name: family for family in registry.collect()}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(found)


def test_names_are_the_conventions_in_prometheus_spelling() -> None:
    units = {"gen_ai.client.token.usage": "{token}"}
    conventions = {
        name.replace(".", "_") + UNITS[units.get(name, "s")]
        for key, name in vars(gen_ai_metrics).items()
        if key.startswith(("GEN_AI_SERVER_", "GEN_AI_CLIENT_TOKEN"))
    }
    assert set(told()) == conventions


def test_labels_are_the_conventions_attributes() -> None:
    attributes = {
        name.replace(".", "_")
        for module in (gen_ai_attributes, error_attributes)
        for key, name in vars(module).items()
        if key.isupper() and isinstance(name, str)
    }
    labels = {key for family in told(DONE).values() for s in family.samples for key in s.labels}
    assert labels - {"le"} <= attributes


def test_a_request_is_told_by_its_times_and_tokens() -> None:
    families = told(DONE)
    of = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "quickchange",
        "gen_ai_request_model": "canary",
    }
    assert value(families, "gen_ai_server_request_duration_seconds_sum", **of, error_type="") == 2.5
    assert value(families, "gen_ai_server_time_to_first_token_seconds_sum", **of) == 0.5
    assert value(families, "gen_ai_server_time_per_output_token_seconds_sum", **of) == 0.2
    tokens = "gen_ai_client_token_usage_sum"
    assert value(families, tokens, **of, gen_ai_token_type="input") == 7
    assert value(families, tokens, **of, gen_ai_token_type="output") == 12


@pytest.mark.parametrize(("ending", "used"), [("failed", 2), ("refused", 0)])
def test_a_request_that_failed_has_an_error_and_no_time_to_its_first_token(
    ending: str, used: int
) -> None:
    families = told(replace(DONE, ending=ending))  # type: ignore[arg-type]
    duration = "gen_ai_server_request_duration_seconds_count"
    assert value(families, duration, error_type="_OTHER") == 1
    assert value(families, "gen_ai_server_time_to_first_token_seconds_count") == 0
    assert value(families, "gen_ai_client_token_usage_count") == used


def test_one_token_of_each_choice_has_no_time_per_token() -> None:
    families = told(replace(DONE, completion_tokens=2))
    assert value(families, "gen_ai_server_time_per_output_token_seconds_count") == 0


def test_models_beyond_the_bound_share_a_label() -> None:
    names = ["a", "b", "c"]
    families = told(*(replace(DONE, opened=replace(OPENED, model=n)) for n in names), limit=1)
    samples = families["gen_ai_server_request_duration_seconds"].samples
    assert {s.labels["gen_ai_request_model"] for s in samples} == {"a", "other"}


@pytest.mark.parametrize(
    ("request_id", "name"),
    [
        ("chatcmpl-a", "chat"),
        ("resp_a", "chat"),
        ("msg_a", "chat"),
        ("cmpl-a", "text_completion"),
        ("gen-a", "text_completion"),
        ("embd-a", "embeddings"),
        ("rerank-a", "embeddings"),
    ],
)
def test_the_operation_follows_from_the_answers_id(request_id: str, name: str) -> None:
    assert operation(replace(OPENED, request_id=request_id)) == name


def test_an_adapters_version_is_the_model_that_answered() -> None:
    assert response_model(OPENED) == "orders@abababababab"
    assert response_model(replace(OPENED, digests=())) == "canary"
    assert response_model(replace(OPENED, digests=("a" * 64, "b" * 64))) == "canary"


def test_they_are_exported_with_the_setting_alone_and_told_by_ingresses(tmp_path: Path) -> None:
    Store(tmp_path).add("orders", make_adapter(1.0))
    for on in (True, False):
        with live_server(tmp_path, genai_metrics=on) as live:
            for model in (BASE, "orders"):
                live.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 3})
            text = live.http.get("/metrics").text
            assert ("gen_ai_client_token_usage_count{" in text) == on
    assert told_by("gen_ai_client_token_usage") == ("ingress",)


def test_the_document_lists_them_with_their_labels() -> None:
    text = (Path(__file__).parents[3] / "docs" / "gateways.md").read_text()
    rows = re.findall(r"^\| `(gen_ai_\w+)` \| (.+?) \|", text, re.MULTILINE)
    listed = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    families = told(DONE)
    assert listed == {
        name: {key for sample in family.samples for key in sample.labels} - {"le"}
        for name, family in families.items()
    }
