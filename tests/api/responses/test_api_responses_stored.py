"""Stored responses over HTTP: continued, retrieved, listed, cancelled, deleted, and for whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server
from keys_support import client_of, created, in_database, keyed_server
from sqlalchemy import func, select
from text_support import END, byte_text
from tool_templates import MARKED

from quickchange_server.storage.responses.tables_responses import STORED_RESPONSES

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
ANSWER = 'One moment.<tool_call>\n{"name": "weather", "arguments": {"city": "Porto"}}\n</tool_call>'
SAYS = (*ANSWER.encode(), END)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    behaviour = Behaviour(says=SAYS, journal=folder / "journal")
    with live_server(folder / "store", behaviour, byte_text(MARKED), store_responses=True) as live:
        yield live


@pytest.fixture(scope="module")
def endless(folder: Path) -> Iterator[Live]:
    """A server whose answers are slow and long."""
    behaviour = Behaviour(step_seconds=0.02, says=(*b"word ",))
    with live_server(folder / "endless", behaviour, byte_text(), store_responses=True) as live:
        yield live


def made(live: Live, **fields: Any) -> Any:
    response = live.post("/v1/responses", {"model": BASE, "input": "Rain?", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(folder: Path) -> str:
    prompt: Any = entries(folder / "journal", "Submit")[-1]["prompt"]
    return bytes(token for token in prompt if token < 256).decode()


def missing(response: httpx.Response) -> bool:
    return response.status_code == 404 and response.json()["error"]["code"] == "not_found"


# --- conversations ------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_its_last_response(live: Live, folder: Path) -> None:
    first = made(live, instructions="Be brief.", tools=[WEATHER])
    assert first["store"] is True
    call = first["output"][-1]
    given = {"type": "function_call_output", "call_id": call["call_id"], "output": "12 mm"}
    second = made(live, input=[given], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert prompt_of(folder) == f"user\nRain?\nassistant\n{ANSWER}\ntool\n12 mm\nassistant\n"
    made(live, input="And now?", previous_response_id=second["id"])
    assert prompt_of(folder).count(ANSWER) == 2
    assert prompt_of(folder).endswith("user\nAnd now?\nassistant\n")


def test_two_responses_may_continue_one(live: Live, folder: Path) -> None:
    first = made(live, input="Mine is Ann.")
    made(live, input="No, Bea.", previous_response_id=first["id"])
    made(live, input="Which?", previous_response_id=first["id"])
    assert "Ann" in prompt_of(folder)
    assert "Bea" not in prompt_of(folder)


def test_an_items_reference_stands_for_the_item(live: Live, folder: Path) -> None:
    first = made(live)
    (message,) = first["output"]
    listed = live.http.get(f"/v1/responses/{first['id']}/input_items").json()["data"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (*listed, message)]
    made(live, input=[*references, {"role": "user", "content": "Sure?"}])
    assert prompt_of(folder).startswith("user\nRain?\nassistant\nOne moment.")
    bare = live.post("/v1/responses", {"model": BASE, "input": [{"id": message["id"]}]})
    assert bare.status_code == 200, bare.text


@pytest.mark.parametrize("id", ["msg_none", f"msg_{'0' * 32}0", "", "\u0000"])
def test_a_reference_to_nothing_is_404(live: Live, id: str) -> None:
    items = [{"role": "user", "content": "x"}, {"type": "item_reference", "id": id}]
    response = live.post("/v1/responses", {"model": BASE, "input": items})
    assert missing(response)
    assert response.json()["error"]["param"] == "input[1].id"


@pytest.mark.parametrize("id", ["resp_none", "", "x" * 512, "\u0000"])
def test_an_unknown_previous_response_is_404(live: Live, id: str) -> None:
    response = live.post("/v1/responses", {"model": BASE, "input": "x", "previous_response_id": id})
    assert missing(response)
    assert response.json()["error"]["param"] == "previous_response_id"


def test_a_conversation_whose_beginning_is_deleted_cannot_go_on(live: Live) -> None:
    first = made(live)
    second = made(live, previous_response_id=first["id"])
    assert live.http.delete(f"/v1/responses/{first['id']}").json()["deleted"] is True
    body = {"model": BASE, "input": "x", "previous_response_id": second["id"]}
    response = live.post("/v1/responses", body)
    assert missing(response)
    assert first["id"] in response.json()["error"]["message"]


def test_what_is_not_to_be_stored_is_not(live: Live) -> None:
    told = made(live, store=False)
    assert told["store"] is False
    assert missing(live.http.get(f"/v1/responses/{told['id']}"))


# --- reading back -------------------------------------------------------------------------------


def test_a_response_is_read_back_as_it_was_told(live: Live) -> None:
    told = made(live, tools=[WEATHER], metadata={"a": "b"})
    assert live.http.get(f"/v1/responses/{told['id']}").json() == told


def test_a_streamed_response_is_there_when_its_last_event_is(live: Live) -> None:
    body = {"model": BASE, "input": "Rain?", "stream": True}
    with live.http.stream("POST", "/v1/responses", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        for line in lines:
            event = json.loads(line.removeprefix("data: "))
            if event["type"] == "response.completed":
                told = event["response"]
                assert live.http.get(f"/v1/responses/{told['id']}").json() == told
    assert event["type"] == "response.completed"


def test_a_stored_responses_events_are_not_kept(live: Live) -> None:
    response = live.http.get(f"/v1/responses/{made(live)['id']}?stream=true")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream"


def test_a_restart_changes_nothing(folder: Path) -> None:
    start = partial(
        live_server, folder / "again", Behaviour(says=SAYS), byte_text(), store_responses=True
    )
    with start() as before:
        told = made(before)
    with start() as after:
        assert after.http.get(f"/v1/responses/{told['id']}").json() == told
        assert made(after, previous_response_id=told["id"])["previous_response_id"] == told["id"]


def test_the_input_is_listed_in_pages(live: Live) -> None:
    first = made(live, input="One.")
    parts = [{"type": "input_text", "text": "Two."}, {"type": "input_text", "text": "Three."}]
    items = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Four."}]
    second = made(live, input=items, previous_response_id=first["id"])
    path = f"/v1/responses/{second['id']}/input_items"
    whole = live.http.get(path, params={"order": "asc"}).json()
    said = [[part["text"] for part in item["content"]] for item in whole["data"]]
    assert said == [["One."], [ANSWER], ["Two.", "Three."], ["Four."]]
    kinds = [item["content"][0]["type"] for item in whole["data"]]
    assert kinds == ["input_text", "output_text", "input_text", "output_text"]
    assert whole["has_more"] is False
    assert len({item["id"] for item in whole["data"]}) == 4
    page = live.http.get(path, params={"limit": 3}).json()
    assert page["data"] == whole["data"][:0:-1]
    assert page["has_more"] is True
    assert (page["first_id"], page["last_id"]) == (whole["data"][3]["id"], whole["data"][1]["id"])
    rest = live.http.get(path, params={"after": page["last_id"]}).json()
    assert rest["data"] == whole["data"][:1]
    assert rest["has_more"] is False
    refused = live.http.get(path, params={"after": "msg_none"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")


# --- cancelling ---------------------------------------------------------------------------------


def begun(response: httpx.Response) -> tuple[str, Iterator[dict[str, Any]]]:
    """The id of a response that is streamed, and its further events."""
    events = (
        json.loads(line.removeprefix("data: "))
        for line in response.iter_lines()
        if line.startswith("data: ")
    )
    return next(events)["response"]["id"], events


def test_a_stream_is_cancelled_and_kept_so(endless: Live) -> None:
    body = {"model": BASE, "input": "?", "stream": True}
    with endless.http.stream("POST", "/v1/responses", json=body) as response:
        id, events = begun(response)
        while next(events)["type"] != "response.output_text.delta":
            pass
        path = f"/v1/responses/{id}"
        assert endless.http.get(path).json()["status"] == "in_progress"
        cancelled = endless.http.post(f"{path}/cancel").json()
        last = list(events)
    assert cancelled["status"] == "cancelled"
    assert cancelled["output"][0]["status"] == "incomplete"
    assert last[-1]["type"] == "response.incomplete"
    assert last[-1]["response"]["status"] == "cancelled"
    kinds = [event["type"] for event in last]
    assert "response.output_item.done" in kinds
    assert endless.http.get(path).json() == cancelled
    assert endless.http.post(f"{path}/cancel").json() == cancelled
    assert endless.services.client.in_flight == 0
    refused = endless.post(
        "/v1/responses", {"model": BASE, "input": "x", "previous_response_id": id}
    )
    assert refused.status_code == 400
    assert "cancelled" in refused.json()["error"]["message"]


def test_a_response_that_has_ended_is_not_cancelled(live: Live) -> None:
    response = live.http.post(f"/v1/responses/{made(live)['id']}/cancel")
    assert response.status_code == 400
    assert "Cannot cancel a synchronous response." in response.json()["error"]["message"]
    assert missing(live.http.post("/v1/responses/resp_none/cancel"))


def test_a_client_that_goes_away_leaves_nothing(endless: Live) -> None:
    body = {"model": BASE, "input": "?", "stream": True}
    with endless.http.stream("POST", "/v1/responses", json=body) as response:
        id, _ = begun(response)
    path = f"/v1/responses/{id}"
    while endless.services.client.in_flight or not missing(endless.http.get(path)):
        pass


# --- whose they are -----------------------------------------------------------------------------


def test_another_tenants_response_and_another_keys_are_unknown(folder: Path) -> None:
    with keyed_server(
        folder / "keyed", behaviour=Behaviour(says=SAYS), store_responses=True
    ) as live:
        secrets = [created(live, tenant=tenant)[1] for tenant in ("acme", "acme", "other")]
        body = {"model": BASE, "input": "Rain?"}
        with client_of(live, secrets[0]) as own:
            told = own.post("/v1/responses", json=body).json()
            path = f"/v1/responses/{told['id']}"
            assert own.get(path).json() == told
        for secret in secrets[1:]:
            with client_of(live, secret) as other:
                assert missing(other.get(path))
                assert missing(other.get(f"{path}/input_items"))
                assert missing(other.post(f"{path}/cancel"))
                assert missing(other.delete(path))
                continued = {**body, "previous_response_id": told["id"]}
                assert missing(other.post("/v1/responses", json=continued))
                reference = {"type": "item_reference", "id": told["output"][0]["id"]}
                assert missing(other.post("/v1/responses", json={**body, "input": [reference]}))
        with client_of(live, secrets[0]) as own:
            assert own.get(path).json() == told


def test_without_the_setting_nothing_is_written(folder: Path) -> None:
    with live_server(folder / "off", Behaviour(says=SAYS)) as live:
        made(live, store=True)
    count = in_database(
        folder / "off", lambda c: c.scalar(select(func.count()).select_from(STORED_RESPONSES))
    )
    assert count == 0
