# requires: instructor==1.17.0
"""instructor: typed answers by tools (its default) and by JSON, whole, partial and in lists."""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = CLOSED
    first: Line
    second: Line | None = None


ASK = {"messages": [{"role": "user", "content": "Order a small hose."}], "max_tokens": 200}
server = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)
client = instructor.from_openai(server)
for model in (MODEL, ADAPTER):
    order = client.chat.completions.create(model=model, response_model=Order, max_retries=0, **ASK)
    assert isinstance(order, Order), order
parts = list(client.chat.completions.create_partial(model=MODEL, response_model=Order, **ASK))
Order.model_validate(parts[-1].model_dump())

for mode in (
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
):
    client = instructor.from_openai(server, mode=mode)
    order = client.chat.completions.create(
        model=ADAPTER, response_model=Order, max_retries=0, **ASK
    )
    assert isinstance(order, Order), (mode, order)

try:
    instructor.from_openai(server).chat.completions.create(
        model="nobody", response_model=Order, max_retries=0, **ASK
    )
    refused = None
except Exception as error:
    refused = error
assert "nobody" in str(refused), refused
