# requires: anthropic==2.14.0
"""Anthropic's own client: messages, streams, tools and their runner, counts, typed answers."""

import asyncio
import json
import os
from typing import Literal

import anthropic
from anthropic import beta_tool
from pydantic import BaseModel

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
OPTIONS = {"base_url": URL, "api_key": "none", "max_retries": 0, "timeout": 300}
client = anthropic.Anthropic(**OPTIONS)
ASK = [{"role": "user", "content": "Order a small hose."}]
CACHED = {"cache_control": {"type": "ephemeral"}}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "string", "enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}
TOOL = {"name": "order", "description": "Place an order.", "input_schema": SCHEMA}


class Order(BaseModel):
    size: Literal["small", "large"]


for model in (MODEL, ADAPTER):
    asked = {"model": model, "messages": ASK, "max_tokens": 12}
    answer = client.messages.create(**asked, extra_body={"temperature": 0})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", model), answer
    (block,) = answer.content
    assert block.type == "text", answer
    assert block.text, answer
    assert answer._request_id, answer
    assert answer.stop_reason == "max_tokens" or answer.usage.output_tokens < 12, answer
    count = client.messages.count_tokens(model=model, messages=ASK)
    assert count.input_tokens == answer.usage.input_tokens, count

    with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == block.text, pieces
    assert [one.text for one in final.content] == [block.text], final
    assert final.stop_reason == answer.stop_reason, final
    assert final.usage.output_tokens == answer.usage.output_tokens, final
    raw = [event.type for event in client.messages.create(**asked, stream=True)]
    assert (raw[0], raw[-1]) == ("message_start", "message_stop"), raw

# Claude Code's kind of request: a long system prompt in marked blocks, many tools, an earlier turn
system = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0f3a1;"},
    {"type": "text", "text": "You place orders of garden tools. " * 20, **CACHED},
]
tools = [{**TOOL, "name": f"mcp__shop__order_{number}"} for number in range(20)]
tools[-1] |= CACHED
turns = [
    *ASK,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A hose.", "signature": "0a"},
            {"type": "text", "text": "I'll order it."},
            {
                "type": "tool_use",
                "id": "toolu_01",
                "name": "mcp__shop__order_0",
                "input": {"size": "small"},
            },
        ],
    },
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "toolu_01",
                "is_error": True,
                "content": [{"type": "text", "text": "<error>sold out</error>"}],
                **CACHED,
            },
            {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
        ],
    },
]
code = {
    "model": MODEL,
    "system": system,
    "tools": tools,
    "messages": turns,
    "thinking": {"type": "adaptive", "display": "omitted"},
    "output_config": {"effort": "high"},
    "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14"],
}
count = client.beta.messages.count_tokens(**code)
for _ in range(2):
    answer = client.beta.messages.create(
        **code,
        max_tokens=8,
        metadata={"user_id": "user_1_account__session_2"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    usage = answer.usage
    total = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert total == count.input_tokens, (usage, count)
assert usage.cache_read_input_tokens > 0, usage  # the second time

for choice in ({"type": "any"}, {"type": "tool", "name": "order"}):
    asked = {"model": MODEL, "messages": ASK, "max_tokens": 300, "tools": [TOOL]}
    answer = client.messages.create(**asked, tool_choice=choice)
    assert answer.stop_reason == "tool_use", answer
    (call,) = answer.content
    assert (call.type, call.name) == ("tool_use", "order"), answer
    assert call.input["size"] in ("small", "large"), answer
    with client.messages.stream(**asked, tool_choice=choice) as stream:
        told = "".join(event.partial_json for event in stream if event.type == "input_json")
        (call,) = stream.get_final_message().content
    assert json.loads(told) == call.input, (told, call)
    back = {"type": "tool_result", "tool_use_id": call.id, "content": "Ordered."}
    history = [
        *ASK,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [back]},
    ]
    answer = client.messages.create(model=MODEL, messages=history, max_tokens=8, tools=[TOOL])
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use"), answer
asked |= {"tools": [{**TOOL, "strict": True}], "tool_choice": {"type": "auto"}, "max_tokens": 30}
answer = client.messages.create(**asked)
assert all(block.input["size"] for block in answer.content if block.type == "tool_use"), answer
answer = client.messages.create(**asked | {"tool_choice": {"type": "none"}})
assert [block.type for block in answer.content] == ["text"], answer

ran = []


@beta_tool
def place(size: Literal["small", "large"]) -> str:
    """Place an order.

    Args:
        size: The size of the hose.
    """
    ran.append(size)
    if len(ran) > 1:
        raise ValueError("sold out")
    return "Ordered."


runner = client.beta.messages.tool_runner(
    model=MODEL,
    messages=ASK,
    max_tokens=300,
    tools=[place],
    tool_choice={"type": "tool", "name": "place"},
    max_iterations=3,
)
answers = list(runner)
assert len(answers) == 3, answers
assert len(ran) >= 2, ran

form = {"format": {"type": "json_schema", "schema": SCHEMA}}
answer = client.messages.create(model=MODEL, messages=ASK, max_tokens=200, output_config=form)
assert json.loads(answer.content[0].text)["size"] in ("small", "large"), answer
answer = client.messages.parse(model=ADAPTER, messages=ASK, max_tokens=200, output_format=Order)
assert isinstance(answer.parsed_output, Order), answer

answer = client.messages.create(
    model=MODEL, messages=ASK, max_tokens=60, stop_sequences=["e", "a", "o", " "]
)
assert answer.stop_reason == "stop_sequence", answer
assert answer.stop_sequence in ("e", "a", "o", " "), answer


async def streamed():
    async with (
        anthropic.AsyncAnthropic(**OPTIONS) as several,
        several.messages.stream(model=MODEL, messages=ASK, max_tokens=8) as stream,
    ):
        async for _ in stream:
            pass
        return await stream.get_final_message()


assert asyncio.run(streamed()).usage.output_tokens <= 8

models = client.models.list()
assert {MODEL, ADAPTER} <= {model.id for model in models}, models
assert client.models.retrieve(ADAPTER).display_name == ADAPTER

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
for fields, kind, said in (
    ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
    ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
    ({"max_tokens": 10**9}, anthropic.BadRequestError, "max_tokens"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "image"),
    ({"tools": [SEARCH]}, anthropic.BadRequestError, "web_search"),
    ({"extra_body": {"nonsense": 1}}, anthropic.BadRequestError, "nonsense"),
):
    for stream in (False, True):
        asked = {"model": MODEL, "messages": ASK, "max_tokens": 5, "stream": stream, **fields}
        try:
            client.messages.create(**asked)
            refused = None
        except anthropic.APIStatusError as error:
            refused = error
        assert type(refused) is kind, (fields, refused)
        assert said in refused.api_message, refused
        assert (
            refused.type
            == {400: "invalid_request_error", 404: "not_found_error"}[refused.status_code]
        )
        assert refused.request_id == refused.body["request_id"], refused
