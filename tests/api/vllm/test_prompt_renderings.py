"""vLLM's /render routes answer with what would be sent, and generate nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_support import BASE, Live, live_server, make_adapter
from text_support import byte_text
from tool_templates import MARKED

from quickchange_store.store import Store

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LIMIT = 64
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("rendering")
    Store(folder).add("sql", make_adapter(1.0))
    with live_server(folder, text=byte_text(MARKED), max_model_len=LIMIT) as live:
        yield live


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {"model": "sql", **prompt, **fields}


def rendered(live: Live, path: str, **headers: str) -> Any:
    return lambda **fields: live.http.post(
        f"{path}/render", json=body(path, **fields), headers=headers
    )


def one(response: Any) -> Any:
    """The only prompt of an answer."""
    assert response.status_code == 200, response.text
    told = response.json()
    return told[0] if isinstance(told, list) else told


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_the_ids_are_those_of_the_answered_request(live: Live, path: str) -> None:
    told = one(rendered(live, path)(temperature=0.25, stop=["x"], logit_bias={"5": 1}))
    own = live.post(path, body(path, return_token_ids=True, max_tokens=1)).json()
    holder = own if path == CHAT else own["choices"][0]
    assert told["token_ids"] == holder["prompt_token_ids"]
    assert told["model"] == "sql"
    sampling = told["sampling_params"]
    assert (sampling["temperature"], sampling["stop"]) == (0.25, ["x"])
    assert sampling["logit_bias"] == {"5": 1}
    left = LIMIT - len(told["token_ids"])
    assert sampling["max_tokens"] == (left if path == CHAT else 16)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_stream_is_told_of_but_not_made(live: Live, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = one(rendered(live, path)(stream=True, stream_options=options))
    assert (told["stream"], told["stream_options"]) == (True, options)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_offsets_are_told_on_demand(live: Live, path: str) -> None:
    assert one(rendered(live, path)())["token_offsets"] is None
    told = one(rendered(live, path)(return_token_offsets=True))
    assert len(told["token_offsets"]) == len(told["token_ids"])
    cut = one(rendered(live, path)(return_token_offsets=True, truncate_prompt_tokens=1))
    assert cut["token_ids"] == told["token_ids"][-1:]
    assert cut["token_offsets"] == told["token_offsets"][-1:]


def test_offsets_count_a_prompts_characters(live: Live) -> None:
    told = one(rendered(live, COMPLETION)(return_token_offsets=True))
    assert told["token_offsets"] == [[0, 1], [1, 2]]
    refused = rendered(live, COMPLETION)(return_token_offsets=True, prompt=[1, 2])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "return_token_offsets"


def test_each_prompt_of_a_list_has_its_own(live: Live) -> None:
    several = rendered(live, COMPLETION)(prompt=["Hi", "you"], request_id="abc").json()
    assert [len(each["token_ids"]) for each in several] == [2, 3]
    assert [each["request_id"] for each in several] == ["cmpl-abc-0", "cmpl-abc-1"]


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "chatcmpl"), (COMPLETION, "cmpl")])
def test_the_id_is_the_headers_or_the_fields_or_new(live: Live, path: str, kind: str) -> None:
    header = {"x-request-id": "mine"}
    named = one(rendered(live, path, **header)(request_id="abc"))
    assert named["request_id"] == f"{kind}-mine"
    assert one(rendered(live, path)(request_id="abc"))["request_id"] == f"{kind}-abc"
    new = {one(rendered(live, path)())["request_id"] for _ in range(2)}
    assert len(new) == 2
    bad = one(rendered(live, path, **{"x-request-id": "a b"})(request_id="abc"))
    assert bad["request_id"] == f"{kind}-abc"


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "nothing"}, 404),
        ({"max_tokens": LIMIT}, 400),
        ({"temperature": 9}, 400),
        ({"min_tokens": LIMIT}, 400),
        ({"stop_token_ids": [10**6]}, 400),
        ({"prompt_logprobs": 21}, 400),
        ({"use_beam_search": True}, 400),
        ({"request_id": "x" * 129}, 400),
    ],
)
def test_what_generation_refuses_is_refused_alike(
    live: Live, path: str, fields: dict[str, Any], status: int
) -> None:
    assert rendered(live, path)(**fields).status_code == status


def test_a_chats_tools_are_in_its_prompt(live: Live) -> None:
    plain = one(rendered(live, CHAT)())["token_ids"]
    with_tools = rendered(live, CHAT)(tools=TOOLS, truncate_prompt_tokens=LIMIT - 1)
    assert one(with_tools)["token_ids"] != plain
    assert len(one(with_tools)["token_ids"]) > len(plain)


def test_the_base_renders_as_its_adapters_do(live: Live) -> None:
    own, base = (one(rendered(live, CHAT)(model=name)) for name in ("sql", BASE))
    assert own["token_ids"] == base["token_ids"]
