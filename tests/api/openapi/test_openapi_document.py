"""What the OpenAPI document says of every operation."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_support import document, schema_of

from quickchange_server.api.auth import OPEN
from quickchange_server.api.openapi_document import operations_of


def named(part: Any) -> set[str]:
    """The schemas that a part of the document refers to."""
    if isinstance(part, list):
        return set().union(*map(named, part))
    if not isinstance(part, dict):
        return set()
    found = set().union(*map(named, part.values()))
    reference = part.get("$ref")
    return found | {reference.rpartition("/")[2]} if isinstance(reference, str) else found


@pytest.fixture(scope="module")
def keyed() -> dict[str, Any]:
    return document(api_keys=True)


def test_it_is_valid_openapi(keyed: dict[str, Any]) -> None:
    schema_of(keyed, examples=1).validate()


def test_every_operation_says_what_it_answers(keyed: dict[str, Any]) -> None:
    for place, operation in operations_of(keyed):
        for status, response in operation["responses"].items():
            for kind, content in response.get("content", {}).items():
                if kind == "application/json":
                    assert named(content["schema"]) <= keyed["components"]["schemas"].keys()
                    assert named(content["schema"]), (place, status)
                else:
                    assert kind in (
                        "text/plain",
                        "text/event-stream",
                        "text/html",
                        "application/octet-stream",
                    )
                    assert content["schema"]["type"] in ("string", "object"), (place, status)


def test_every_operation_that_needs_a_key_says_what_refuses_it(keyed: dict[str, Any]) -> None:
    for place, operation in operations_of(keyed):
        if operation["security"]:
            assert operation["responses"].keys() >= {"401", "403"}, place


def test_every_reference_leads_somewhere_and_nothing_is_there_unused(keyed: dict[str, Any]) -> None:
    schemas = keyed["components"]["schemas"]
    assert named(keyed) == schemas.keys()
    assert not any("$defs" in schema for schema in schemas.values())


def test_events_of_a_stream_are_its_chunks_or_an_error_or_the_end(keyed: dict[str, Any]) -> None:
    answer = keyed["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert named(answer["application/json"]) == {"ChatCompletion"}
    event = answer["text/event-stream"]["schema"]["properties"]["data"]
    assert named(event) == {"ChatCompletionChunk", "ErrorBody"}
    assert {"const": "[DONE]"} in event["anyOf"]


def test_keys_are_asked_for_everywhere_but_where_none_is_needed(keyed: dict[str, Any]) -> None:
    operations = {
        (method.upper(), path): operation for (method, path), operation in operations_of(keyed)
    }
    unkeyed = {place for place, operation in operations.items() if operation["security"] == []}
    assert unkeyed
    assert unkeyed == OPEN & operations.keys()  # the page's files are in no API's document
    assert keyed["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_metrics_need_no_key_where_they_are_open() -> None:
    told = document(api_keys=True, open_metrics=True)["paths"]["/metrics"]["get"]
    assert told["security"] == []


def test_a_server_without_keys_asks_for_none() -> None:
    told = document()
    assert "securitySchemes" not in told["components"]
    assert all("security" not in operation for _, operation in operations_of(told))


def test_an_upload_is_told_beside_the_path(keyed: dict[str, Any]) -> None:
    body = keyed["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    assert "adapter_model.safetensors" in body["multipart/form-data"]["schema"]["properties"]


def test_fields_with_a_default_take_null(keyed: dict[str, Any]) -> None:
    fields = keyed["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"type": "null"} in fields["temperature"]["anyOf"]
    assert {"type": "null"} not in fields["prompt"]["anyOf"]
