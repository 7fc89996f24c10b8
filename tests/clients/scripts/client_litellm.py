# requires: litellm==1.110.2
"""litellm: its openai/ and hosted_vllm/ routes, and text completion."""

import os
from typing import Literal

import litellm
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
SERVER = {"api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0, "timeout": 300}


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = CLOSED
    first: Line
    second: Line | None


ASK = [{"role": "user", "content": "Order a small hose."}]
TOOL = {
    "type": "function",
    "function": {"name": "order", "parameters": Order.model_json_schema()},
}
assert "$defs" in TOOL["function"]["parameters"]

for route, name in (("openai", MODEL), ("hosted_vllm", ADAPTER)):
    body = {"model": f"{route}/{name}", "messages": ASK, "temperature": 0, **SERVER}
    answer = litellm.completion(max_tokens=12, **body)
    assert answer.choices[0].message.content, answer
    chunks = litellm.completion(max_tokens=12, stream=True, **body)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == answer.choices[0].message.content, pieces

    order = litellm.completion(max_tokens=200, response_format=Order, **body)
    Order.model_validate_json(order.choices[0].message.content)

    for forced in ("required", {"type": "function", "function": {"name": "order"}}):
        answer = litellm.completion(max_tokens=200, tools=[TOOL], tool_choice=forced, **body)
        (call,) = answer.choices[0].message.tool_calls
        Order.model_validate_json(call.function.arguments, extra="ignore")  # litellm opens it
    history = [
        *ASK,
        answer.choices[0].message.model_dump(),  # with provider_specific_fields
        {"role": "tool", "tool_call_id": call.id, "content": "Ordered."},
    ]
    answer = litellm.completion(max_tokens=12, tools=[TOOL], **body | {"messages": history})
    assert answer.choices[0].finish_reason, answer
    streamed = litellm.completion(
        max_tokens=200, tools=[TOOL], tool_choice="required", stream=True, **body
    )
    whole = litellm.stream_chunk_builder(list(streamed), messages=ASK)
    (call,) = whole.choices[0].message.tool_calls
    Order.model_validate_json(call.function.arguments, extra="ignore")

    found = litellm.embedding(model=f"{route}/{MODEL}", input=["one", "two"], **SERVER)
    assert len(found.data) == 2, found
    try:
        litellm.completion(model=f"{route}/nobody", messages=ASK, **SERVER)
        refused = None
    except litellm.NotFoundError as error:
        refused = error
    assert "nobody" in str(refused), refused

answer = litellm.text_completion(
    model=f"text-completion-openai/{ADAPTER}", prompt="Once", max_tokens=5, **SERVER
)
assert answer.choices[0].text, answer
