# requires: inspect-ai==0.3.285 openai==3.57.0
"""inspect-ai: evaluations by openai-api/, with its tools, a tool's choice and typed answers."""

import asyncio
import os
import tempfile
from typing import Literal

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
SERVER = {"base_url": f"{URL}/v1", "api_key": "none"}


class Line(BaseModel):
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    first: Line


@tool
def place():
    async def execute(product: Literal["hose", "lock"], count: int):
        """Place an order.

        Args:
            product: what is ordered
            count: how many
        """
        return f"{count} {product}"

    return execute


def model(name, **config):
    return get_model(f"openai-api/quickchange/{name}", config=GenerateConfig(**config), **SERVER)


async def main():
    output = await model(ADAPTER, max_tokens=12, temperature=0).generate("Name a colour.")
    assert output.completion, output
    assert 0 < output.usage.output_tokens <= 12, output
    output = await model(MODEL, max_tokens=100).generate(
        "Order a hose.", tools=[place()], tool_choice="any"
    )
    (call,) = output.message.tool_calls
    assert call.parse_error is None, call
    assert call.arguments["product"] in ("hose", "lock"), call
    output = await model(MODEL, max_tokens=100).generate("Order a hose.", tools=[place()])
    assert output.stop_reason in ("stop", "max_tokens", "tool_calls"), output
    schema = ResponseSchema(name="order", json_schema=json_schema(Order), strict=True)
    output = await model(ADAPTER, max_tokens=100, response_schema=schema).generate("Order a hose.")
    Order.model_validate_json(output.completion)


asyncio.run(main())

samples = [Sample(input=f"Is {number} even?", target="es") for number in range(4)]
with tempfile.TemporaryDirectory() as logs:
    for solver in ([generate()], [use_tools(place()), generate(tool_calls="single")]):
        task = Task(dataset=samples, solver=solver, scorer=includes())
        (log,) = eval(
            task, model=model(MODEL, max_tokens=20, temperature=0), log_dir=logs, display="none"
        )
        assert log.status == "success", log.error
        assert len(log.samples) == 4, log
    (log,) = eval(
        Task(dataset=samples[:1], solver=[generate()], scorer=includes()),
        model=model("nobody", max_tokens=5),
        log_dir=logs,
        display="none",
    )
    assert log.status == "error", log
    assert "nobody" in log.error.message, log.error
