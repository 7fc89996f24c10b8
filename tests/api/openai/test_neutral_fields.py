"""Fields of other servers' APIs at the values that their clients send by default: all accepted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour, entries
from http_support import BASE, Live, live_server, make_adapter
from text_support import byte_text
from tool_templates import MARKED

ASK = [{"role": "user", "content": "Hi"}]

OPENAI = dict.fromkeys(
    ("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
     "max_completion_tokens", "metadata", "modalities", "moderation", "n", "parallel_tool_calls",
     "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_retention",
     "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
     "store", "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs",
     "top_p", "user", "verbosity", "web_search_options", "a_field_of_tomorrow")
)  # fmt: skip
VLLM: dict[str, Any] = {
    **dict.fromkeys(
        ("allowed_token_ids", "cache_salt", "chat_template", "chat_template_kwargs", "documents",
         "ec_transfer_params", "guided_choice", "guided_decoding_backend", "guided_grammar",
         "guided_json", "guided_regex", "guided_whitespace_pattern", "kv_transfer_params",
         "logits_processors", "logprob_token_ids", "media_io_kwargs", "min_p",
         "mm_processor_kwargs", "prompt_logprobs", "repetition_detection", "repetition_penalty",
         "return_prompt_text", "return_token_ids", "return_tokens_as_token_ids", "session_id",
         "stream_interval", "structured_outputs", "thinking_token_budget", "top_k",
         "truncate_prompt_tokens", "truncation_side", "vllm_xargs", "watermarking")
    ),
    "add_special_tokens": None, "bad_words": [], "detokenize": True, "echo": False,
    "ignore_eos": False, "include_reasoning": True, "include_stop_str_in_output": False,
    "length_penalty": 1.0, "min_tokens": 0, "priority": 0, "request_id": "abc", "n": 1,
    "return_mm_kwargs": True, "return_token_offsets": False, "routed_experts_prompt_start": 0,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "stop": [],
    "stop_token_ids": [], "use_beam_search": False, "early_stopping": False, "best_of": 1,
}  # fmt: skip
OF_CHATS: dict[str, Any] = {
    "add_generation_prompt": True, "add_special_tokens": False, "continue_final_message": False,
    "chat_template_kwargs": {}, "documents": [], "functions": [], "function_call": "none",
    "modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": False, "tools": [],
    "tool_prompt": None, "logprobs": False, "top_logprobs": 0, "logit_bias": {},
    "response_format": {"type": "text"}, "stream_options": {},
}  # fmt: skip
OF_COMPLETIONS: dict[str, Any] = {
    "suffix": "", "prompt_embeds": None, "add_special_tokens": True, "logprobs": False,
    "logit_bias": {}, "stream_options": {"include_usage": False}, "best_of": None,
}  # fmt: skip
HINTS: dict[str, Any] = {
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s",
    "store": True, "service_tier": "flex", "reasoning_effort": "none", "verbosity": "low",
    "prediction": {"type": "content", "content": "x"}, "user": "u", "metadata": {"a": "b"},
    "session_id": "s", "stream_interval": 4, "include_reasoning": False,
}  # fmt: skip
TGI: dict[str, Any] = {
    **dict.fromkeys(
        ("adapter_id", "adapter_source", "api_token", "best_of", "decoder_input_details",
         "details", "do_sample", "frequency_penalty", "grammar", "ignore_eos_token",
         "max_new_tokens", "merged_adapters", "presence_penalty", "repetition_penalty",
         "response_format", "return_full_text", "return_k_alternatives", "schema", "seed", "stop",
         "temperature", "top_k", "top_n_tokens", "top_p", "truncate", "typical_p", "watermark",
         "apply_chat_template", "a_field_of_tomorrow")
    ),
}  # fmt: skip
OF_PARAMETERS: dict[str, Any] = {
    "adapter_id": "", "best_of": 1, "decoder_input_details": False, "details": True,
    "do_sample": False, "watermark": False, "return_full_text": False, "ignore_eos_token": False,
    "stop": [], "top_n_tokens": 0, "apply_chat_template": False, "temperature": 1.0,
    "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("neutral") / "journal"


@pytest.fixture(scope="module")
def live(journal: Path) -> Iterator[Live]:
    with live_server(journal.parent / "store", Behaviour(journal=journal), byte_text(MARKED)) as it:
        yield it


def ask(live: Live, path: str, fields: dict[str, Any]) -> Any:
    if path == "/generate":
        return live.post(path, {"inputs": "Hi", "parameters": {"max_new_tokens": 2, **fields}})
    prompt = {"messages": ASK} if "chat" in path else {"prompt": "Hi"}
    return live.post(path, {"model": BASE, "max_tokens": 2, **prompt, **fields})


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TABLES = {
    CHAT: (OPENAI, VLLM, OF_CHATS, HINTS),
    COMPLETION: (OPENAI, VLLM, OF_COMPLETIONS, HINTS),
    "/generate": (TGI, OF_PARAMETERS),
}


@pytest.mark.parametrize("path", TABLES)
def test_what_asks_for_nothing_changes_nothing(live: Live, journal: Path, path: str) -> None:
    def sent(fields: dict[str, Any]) -> Any:
        answered = ask(live, path, {"seed": 1, **fields} if path != "/generate" else fields)
        assert answered.status_code == 200, (fields, answered.text)
        submitted = entries(journal, "Submit")[-1]
        return {k: v for k, v in submitted.items() if k not in ("request_id", "seed")}

    plain = sent({})
    for table in TABLES[path]:
        for name, value in table.items():
            if name != "details":  # its tokens are asked for
                assert sent({name: value}) == plain, name


@pytest.mark.parametrize("path", TABLES)
def test_all_defaults_go_together(live: Live, path: str) -> None:
    for table in TABLES[path]:
        answered = ask(live, path, table)
        assert answered.status_code == 200, answered.text


@pytest.mark.parametrize("path", TABLES)
@pytest.mark.parametrize("value", [1, "x", True, [0], {"a": None}])
def test_an_unknown_field_that_asks_for_something_is_refused(
    live: Live, path: str, value: Any
) -> None:
    answered = ask(live, path, {"a_field_of_tomorrow": value})
    assert answered.status_code == (422 if path == "/generate" else 400)
    assert "a_field_of_tomorrow" in answered.text


ECHOED = {"provider_specific_fields": None, "annotations": [], "refusal": None, "audio": None,
          "function_call": None, "reasoning_content": "hm", "reasoning": "hm", "tool_calls": None,
          "parsed": None, "name": None, "cache_control": {"type": "ephemeral"}}  # fmt: skip


@pytest.mark.parametrize("content", ["x", "", None, [], [{"type": "text", "text": "x"}]])
def test_a_servers_message_is_taken_back_as_it_was_told(live: Live, content: Any) -> None:
    messages = [*ASK, {"role": "assistant", "content": content, **ECHOED}, *ASK]
    assert ask(live, CHAT, {"messages": messages}).status_code == 200


def test_parts_may_carry_hints_and_nothing_else(live: Live, journal: Path) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "x": None}
    parts = [part, {"type": "input_text", "text": "there"}]
    said = {"role": "user", "content": parts, "cache_control": {"type": "ephemeral"}}
    assert ask(live, CHAT, {"messages": [said]}).status_code == 200
    prompt = bytes(t for t in entries(journal, "Submit")[-1]["prompt"] if t < 256)
    assert b"Hi\nthere" in prompt
    wrong = ask(live, CHAT, {"messages": [{**said, "content": [{**part, "detail": "high"}]}]})
    assert wrong.json()["error"]["param"] == "messages[0].content"


def test_tools_and_calls_may_carry_hints(live: Live) -> None:
    function = {"name": "f", "strict": None, "cache_control": {}, "return": {"type": "string"}}
    tool = {"type": "function", "function": function, "cache_control": {"type": "ephemeral"}}
    call = {
        "id": "a",
        "type": "function",
        "index": 0,
        "provider_specific_fields": {"a": 1},
        "function": {"name": "any name", "arguments": "{}", "parsed_arguments": {}},
    }
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "content": None}, *ASK]  # fmt: skip
    answered = ask(live, CHAT, {"tools": [tool], "messages": messages})
    assert answered.status_code == 200, answered.text


@pytest.mark.parametrize("model", ["dummy", "tgi", ""])
def test_a_placeholder_means_the_base_unless_an_adapter_has_its_name(
    live: Live, model: str
) -> None:
    for path in (CHAT, COMPLETION):
        assert ask(live, path, {"model": model}).status_code == 200
    assert live.services.catalog.select(model).adapters == ()
    assert live.post("/v1/embeddings", {"model": model, "input": "x"}).status_code == 200
    assert live.post("/tokenize", {"model": model, "prompt": "x"}).status_code == 200
    if model:
        live.store.add(model, make_adapter(1.0))
        assert ask(live, CHAT, {"model": model}).status_code == 200
        assert len(live.services.catalog.select(model).adapters) == 1


@pytest.mark.parametrize("name", ["schema", "value"])
def test_json_object_takes_a_schema_beside_it(live: Live, journal: Path, name: str) -> None:
    wanted = {"type": "json_object", name: {"type": "object", "required": ["a"]}}
    assert ask(live, CHAT, {"response_format": wanted}).status_code == 200
    kind, source = entries(journal, "Submit")[-1]["constraint"]
    assert kind == "json_schema"
    assert '"required":["a"]' in source
    wrong = ask(live, CHAT, {"response_format": {"type": "json_object", name: {"not": {}}}})
    assert wrong.json()["error"]["param"] == f"response_format.{name}.not"
    for format_ in ({"type": "text", name: {}}, {"type": "json_object", "schema": {}, "value": {}}):
        assert ask(live, CHAT, {"response_format": format_}).status_code == 400


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_continuous_usage_is_in_every_event(live: Live, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    prompt = {"messages": ASK} if path == CHAT else {"prompt": "Hi"}
    body = {"model": BASE, "max_tokens": 5, "stream_options": options, **prompt}
    *events, last, _ = live.events(path, body)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 5
    assert counts[0] == (0 if path == CHAT else 1)  # the role comes before the first token
    assert all(
        event["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for event in events
    )
    alone = {**body, "stream_options": {"continuous_usage_stats": True}}
    assert all("usage" not in event for event in live.events(path, alone)[:-1])
