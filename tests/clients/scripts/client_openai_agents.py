# requires: openai-agents==0.24.0
"""openai-agents with its class for chat completions: text, tools, handoffs, typed output."""

import asyncio
import os
from typing import Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.exceptions import MaxTurnsExceeded
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = CLOSED
    first: Line
    second: Line | None


def agent(model, tokens=200, **options):
    settings = ModelSettings(
        max_tokens=tokens, temperature=0, tool_choice=options.pop("tool_choice", None)
    )
    chat = OpenAIChatCompletionsModel(model=model, openai_client=client)
    return Agent(name="Clerk", model=chat, model_settings=settings, **options)


async def main():
    for model in (MODEL, ADAPTER):
        answer = (await Runner.run(agent(model, 12), "Name a colour.")).final_output
        assert answer, answer
        streamed = Runner.run_streamed(agent(model, 12), "Name a colour.")
        pieces = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        assert "".join(pieces) == answer == streamed.final_output, pieces
        typed = await Runner.run(agent(model, output_type=Order), "Order a small hose.")
        assert isinstance(typed.final_output, Order), typed

    taken = []

    @function_tool
    def place(order: Order) -> str:
        """Place an order."""
        taken.append(order)
        return "placed"

    forced = agent(
        MODEL, tools=[place], tool_choice="required", tool_use_behavior="stop_on_first_tool"
    )
    assert (await Runner.run(forced, "Order a small hose.")).final_output == "placed"
    assert isinstance(taken.pop(), Order)
    streamed = Runner.run_streamed(forced, "Order a small hose.")
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == "placed"

    for options in ({"tools": [place]}, {"handoffs": [agent(ADAPTER, 40)]}):
        for choice in (None, "required"):  # after a forced call the choice is the model's own
            clerk = agent(MODEL, 40, tool_choice=choice, **options)
            try:
                await Runner.run(clerk, "Order a small hose.", max_turns=3)
            except MaxTurnsExceeded:
                assert taken, "only calls go on"

    try:
        await Runner.run(agent("nobody"), "Hello")
        refused = None
    except openai.NotFoundError as error:
        refused = error
    assert refused.param == "model", refused


asyncio.run(main())
