# requires: pydantic-ai-slim[openai]==2.68.0
"""pydantic-ai: text, typed output (by a tool, its default, and by a schema), tools, streams."""

import asyncio
import os
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError, UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = CLOSED
    first: Line
    second: Line | None = None


def agent(model, tokens=200, **options):
    settings = {"max_tokens": tokens, "temperature": 0}
    return Agent(OpenAIChatModel(model, provider=provider), model_settings=settings, **options)


async def main():
    for model in (MODEL, ADAPTER):
        answer = (await agent(model, 12).run("Name a colour.")).output
        assert answer, answer
        async with agent(model, 12).run_stream("Name a colour.") as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True)]
        assert "".join(pieces) == answer, (pieces, answer)

    for kind in (Order, NativeOutput(Order)):
        order = (await agent(ADAPTER, output_type=kind).run("Order a small hose.")).output
        assert isinstance(order, Order), order

    async with agent(ADAPTER, output_type=Order).run_stream("Order a small hose.") as stream:
        assert isinstance(await stream.get_output(), Order)

    helper = agent(MODEL, 60)
    taken = []

    @helper.tool_plain
    def place(order: Order) -> str:
        """Place an order."""
        taken.append(order)
        return "placed"

    try:
        await helper.run("Order a small hose.", usage_limits=UsageLimits(request_limit=3))
    except UsageLimitExceeded:
        assert taken, "only calls go on"

    try:
        await agent("nobody").run("Hello")
        refused = None
    except ModelHTTPError as error:
        refused = error
    assert refused.status_code == 404, refused
    assert "nobody" in str(refused.body), refused


asyncio.run(main())
