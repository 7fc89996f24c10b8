# requires: langchain-openai==1.7.4
"""LangChain: ChatOpenAI's defaults, bound tools, with_structured_output, embeddings in bulk."""

import os
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
SERVER = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0}


CLOSED = ConfigDict(extra="forbid")  # a small model goes on where properties are left open


class Line(BaseModel):
    model_config = CLOSED
    product: Literal["hose", "lock"]
    size: Literal["small", "large"]


class Order(BaseModel):
    """Place an order."""

    model_config = CLOSED
    first: Line = Field(description="what is needed most")
    second: Line | None = None


def chat(model, tokens=200):
    return ChatOpenAI(model=model, temperature=0, max_tokens=tokens, **SERVER)


for model in (MODEL, ADAPTER):
    answer = chat(model, 12).invoke("Name a colour.")
    assert answer.content, answer
    assert 0 < answer.usage_metadata["output_tokens"] <= 12, answer
    pieces = [piece.content for piece in chat(model, 12).stream("Name a colour.")]
    assert "".join(pieces) == answer.content, pieces

question = HumanMessage("Order a small hose.")
for choice in ("any", "Order"):
    answer = chat(MODEL).bind_tools([Order], tool_choice=choice).invoke([question])
    (call,) = answer.tool_calls
    Order(**call["args"])
strict = chat(MODEL).bind_tools([Order], tool_choice="any", strict=True).invoke([question])
Order(**strict.tool_calls[0]["args"])
merged = None
for piece in chat(ADAPTER).bind_tools([Order], tool_choice="any").stream([question]):
    merged = piece if merged is None else merged + piece
Order(**merged.tool_calls[0]["args"])

for strict in (None, True):
    automatic = chat(MODEL, 40).bind_tools([Order], strict=strict).invoke([question])
    assert automatic.content or automatic.tool_calls or automatic.invalid_tool_calls, automatic
after = [question, answer, ToolMessage("Ordered.", tool_call_id=call["id"])]
answer = chat(MODEL, 12).bind_tools([Order]).invoke(after)
assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls"), answer

for method in ("json_schema", "function_calling"):
    order = chat(ADAPTER).with_structured_output(Order, method=method).invoke([question])
    assert isinstance(order, Order), order
assert isinstance(chat(ADAPTER).with_structured_output(Order).invoke([question]), Order)

text = OpenAI(model=ADAPTER, max_tokens=5, **SERVER).invoke("Once upon a time")
assert isinstance(text, str), text

texts = [f"Order {number % 50}" for number in range(350)]
vectors = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **SERVER).embed_documents(
    texts
)
assert len(vectors) == 350
assert vectors[0] == vectors[50] != vectors[1]

try:
    chat("nobody").invoke("Hello")
    refused = None
except openai.NotFoundError as error:
    refused = error
assert "nobody" in str(refused), refused
