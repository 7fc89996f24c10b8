"""What the OpenAPI document says of every operation."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_support import document, schema_of

from quickchange_server.api.auth import OPEN
from quickchange_server.api.openapi.document import operations_of
from quickchange_server.api.openapi.operations import OPERATIONS


@pytest.fixture(scope="module")
def keyed() -> dict[str, Any]:
    return document(api_keys=True)


def test_it_is_valid_openapi(keyed: dict[str, Any]) -> None:
    schema_of(keyed, examples=1).validate()


def test_every_operation_tells_its_answers_and_no_other_is_told(keyed: dict[str, Any]) -> None:
    assert {place for place, _ in operations_of(keyed)} == set(OPERATIONS)


def test_every_answer_with_a_body_says_what_is_in_it(keyed: dict[str, Any]) -> None:
    for place, operation in operations_of(keyed):
        for status, response in operation["responses"].items():
            for content in response["content"].values():
                assert content["schema"], (place, status)


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
    assert fields["model"]["type"] == "string"
