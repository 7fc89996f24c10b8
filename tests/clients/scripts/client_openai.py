# requires: openai==3.57.0
"""OpenAI's own client: chat, streams, its helpers for tools and for structured output."""

import os
from typing import Literal

import openai
from pydantic import BaseModel

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)


class Line(BaseModel):
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    """Place an order."""

    first: Line
    second: Line | None


def said(text):
    return [{"role": "user", "content": text}]


for model in (MODEL, ADAPTER):
    answer = client.chat.completions.create(
        model=model, messages=said("Name a colour."), temperature=0, max_tokens=12
    )
    assert answer.model == model, answer
    assert answer.choices[0].message.content, answer
    assert 0 < answer.usage.completion_tokens <= 12, answer
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=said("Name a colour."),
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer.choices[0].message.content, pieces
    assert chunks[-1].usage == answer.usage, chunks[-1]

tool = openai.pydantic_function_tool(Order)
assert "$defs" in tool["function"]["parameters"], tool
for forced in ("required", {"type": "function", "function": {"name": "Order"}}):
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=said("Order a small hose."),
        tools=[tool],
        tool_choice=forced,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Order), call

with client.chat.completions.stream(
    model=ADAPTER,
    messages=said("Order a small hose."),
    tools=[tool],
    tool_choice="required",
    max_tokens=200,
) as stream:
    kinds = [event.type for event in stream]
    answer = stream.get_final_completion()
assert kinds[-1] == "tool_calls.function.arguments.done", kinds
(call,) = answer.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, Order), call

answer = client.chat.completions.create(
    model=MODEL, messages=said("Order a small hose."), tools=[tool], max_tokens=40
)
message = answer.choices[0].message
assert message.content or message.tool_calls, answer
for call in message.tool_calls or ():
    assert call.function.name == "Order", call

answer = client.chat.completions.create(
    model=MODEL,
    max_tokens=12,
    tools=[tool],
    messages=[
        *said("Order a small hose."),
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "Order", "arguments": ""}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "The arguments were cut off."},
    ],
)
assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer

answer = client.chat.completions.parse(
    model=ADAPTER, messages=said("Order a small hose."), response_format=Order, max_tokens=200
)
assert isinstance(answer.choices[0].message.parsed, Order), answer

answer = client.completions.create(model=ADAPTER, prompt=["One", "Two"], max_tokens=5, logprobs=2)
assert len(answer.choices) == 2, answer
assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens / 2, answer

found = client.embeddings.create(model=MODEL, input=["one", "two", "one"]).data
assert found[0].embedding == found[2].embedding != found[1].embedding
assert all(isinstance(value, float) for value in found[0].embedding)

assert {MODEL, ADAPTER} <= {model.id for model in client.models.list()}

for call in (
    lambda: client.chat.completions.create(model="nobody", messages=said("Hello")),
    lambda: client.completions.create(model="nobody", prompt="Hello"),
    lambda: client.embeddings.create(model="nobody", input="Hello"),
):
    try:
        call()
        refused = None
    except openai.NotFoundError as error:
        refused = error
    assert refused.param == "model", refused
    assert "nobody" in refused.message, refused
