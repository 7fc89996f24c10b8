# requires: openai==3.57.0
"""OpenAI's client for Python on /v1/responses: text, tools, typed output, streams, stored ones."""

import os
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    first: Line
    second: Line | None


for model in (MODEL, ADAPTER):
    ask = {"model": model, "input": "Name a colour.", "temperature": 0, "max_output_tokens": 16}
    answer = client.responses.create(**ask)
    assert answer.output_text, answer
    pieces = [
        event.delta
        for event in client.responses.create(**ask, stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(pieces) == answer.output_text, pieces
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds

parsed = client.responses.parse(
    model=ADAPTER, input="Order a small hose.", text_format=Order, max_output_tokens=200
)
assert isinstance(parsed.output_parsed, Order), parsed

tool = openai.pydantic_function_tool(Order, name="order")["function"]
order = {"type": "function", **tool}
for choice in ("required", {"type": "function", "name": "order"}):
    called = client.responses.create(
        model=MODEL, input="Order a small hose.", tools=[order], tool_choice=choice
    )
    (call,) = (item for item in called.output if item.type == "function_call")
    Order.model_validate_json(call.arguments)
given = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
went_on = client.responses.create(
    model=MODEL,
    input=[{"role": "user", "content": "Order a small hose."}, *called.output, given],
    tools=[order],
    tool_choice="none",
    max_output_tokens=16,
)
assert went_on.output_text, went_on

followed = client.responses.create(
    model=MODEL, input=[given], previous_response_id=called.id, max_output_tokens=16
)
assert followed.previous_response_id == called.id
assert client.responses.retrieve(followed.id) == followed
items = list(client.responses.input_items.list(followed.id, order="asc", limit=1))
assert [item.type for item in items] == ["message", "function_call", "function_call_output"], items

long = client.responses.create(model=MODEL, input="Count to 900.", stream=True)
begun = next(iter(long)).response
assert client.responses.cancel(begun.id).status == "cancelled"
assert [event.type for event in long][-1] == "response.incomplete"
assert client.responses.retrieve(begun.id).status == "cancelled"
client.responses.delete(begun.id)
for gone in (begun.id, "resp_none"):
    try:
        client.responses.retrieve(gone)
        found = True
    except openai.NotFoundError:
        found = False
    assert not found

try:
    client.responses.create(model="nobody", input="Hello")
    refused = None
except openai.NotFoundError as error:
    refused = error
assert refused.param == "model", refused
