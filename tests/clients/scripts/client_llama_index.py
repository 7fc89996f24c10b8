# requires: llama-index-llms-openai-like==0.8.1
"""llama-index's OpenAILike: chat and completion models, tools, structured_predict."""

import os
from typing import Literal

import openai
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    """An order."""

    model_config = CLOSED
    first: Line
    second: Line | None = None


def llm(model, tokens, **options):
    options = {"is_chat_model": True, "is_function_calling_model": True, **options}
    return OpenAILike(
        model=model,
        api_base=f"{URL}/v1",
        api_key="none",
        max_tokens=tokens,
        temperature=0,
        max_retries=0,
        context_window=4096,
        **options,
    )


QUESTION = ChatMessage("Name a colour.")
for model in (MODEL, ADAPTER):
    answer = llm(model, 12).chat([QUESTION]).message.content
    assert answer, answer
    pieces = [part.delta or "" for part in llm(model, 12).stream_chat([QUESTION])]
    assert "".join(pieces) == answer, pieces
    whole = llm(model, 8, is_chat_model=False).complete("Once upon a time").text
    pieces = [
        part.delta or ""
        for part in llm(model, 8, is_chat_model=False).stream_complete("Once upon a time")
    ]
    assert "".join(pieces) == whole, pieces


def place(line: Line) -> str:  # noqa: ARG001
    """Place an order."""
    return "placed"


tool = FunctionTool.from_defaults(place)
answer = llm(MODEL, 200).chat_with_tools([tool], "Order a small hose.", tool_required=True)
(call,) = llm(MODEL, 200).get_tool_calls_from_response(answer)
Line.model_validate(call.tool_kwargs["line"])
answer = llm(MODEL, 40).chat_with_tools([tool], "Order a small hose.")
assert answer.message.blocks or answer.message.content is not None, answer

order = llm(ADAPTER, 200).structured_predict(Order, PromptTemplate("Order a small hose."))
assert isinstance(order, Order), order
order = llm(ADAPTER, 200, should_use_structured_outputs=True).structured_predict(
    Order, PromptTemplate("Order a small hose.")
)
assert isinstance(order, Order), order

try:
    llm("nobody", 5).chat([ChatMessage("Hello")])
    refused = None
except openai.NotFoundError as error:
    refused = error
assert "nobody" in str(refused), refused
