# requires: openai-agents==0.24.0
"""openai-agents with its default, /v1/responses: text, tools, handoffs, typed output, histories."""

import asyncio
import os
from typing import Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from agents.exceptions import AgentsException, MaxTurnsExceeded
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=300)
set_default_openai_client(client, use_for_tracing=False)


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    model_config = CLOSED
    first: Line
    second: Line | None


WORD = {"guided_regex": "[a-z]{3,12}"}  # an answer that is cut off is an error to this client


def agent(model, tokens=200, **options):
    settings = ModelSettings(
        max_tokens=tokens,
        temperature=0,
        tool_choice=options.pop("tool_choice", None),
        extra_body=options.pop("body", None),
    )
    return Agent(name="Clerk", model=model, model_settings=settings, **options)


async def main():
    for model in (MODEL, ADAPTER):
        answer = (await Runner.run(agent(model, 24, body=WORD), "Name a colour.")).final_output
        assert answer, answer
        streamed = Runner.run_streamed(agent(model, 24, body=WORD), "Name a colour.")
        pieces = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        assert "".join(pieces) == answer == streamed.final_output, pieces
        first = await Runner.run(agent(model, 24, body=WORD), "Name a colour.")
        asked = [*first.to_input_list(), {"role": "user", "content": "Another?"}]
        assert (await Runner.run(agent(model, 24, body=WORD), asked)).final_output
        went_on = await Runner.run(
            agent(model, 24, body=WORD), "Another?", previous_response_id=first.last_response_id
        )
        assert went_on.final_output
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
            except AgentsException as error:
                if "incomplete" not in str(error):
                    raise

    try:
        await Runner.run(agent("nobody"), "Hello")
        refused = None
    except openai.NotFoundError as error:
        refused = error
    assert refused.param == "model", refused


asyncio.run(main())
