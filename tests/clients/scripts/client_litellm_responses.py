# requires: litellm==1.110.2
"""litellm's responses: its own call, and its bridge from chats to /v1/responses."""

import os

import litellm

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
SERVER = {"api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0, "timeout": 300}
PARAMETERS = {
    "type": "object",
    "properties": {"product": {"enum": ["hose", "lock"]}},
    "required": ["product"],
    "additionalProperties": False,
}
ASK = "Order a small hose."

for name in (MODEL, ADAPTER):
    body = {"model": f"openai/{name}", "input": ASK, "temperature": 0, **SERVER}
    answer = litellm.responses(max_output_tokens=16, **body)
    text = answer.output[0].content[0].text
    assert text, answer
    events = list(litellm.responses(max_output_tokens=16, stream=True, **body))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == text, pieces
    tool = {"type": "function", "name": "order", "parameters": PARAMETERS}
    called = litellm.responses(tools=[tool], tool_choice="required", **body)
    assert [item.type for item in called.output] == ["function_call"], called

    bridged = {"model": f"openai/responses/{name}", "temperature": 0, **SERVER}
    chat = {**bridged, "messages": [{"role": "user", "content": ASK}]}
    answer = litellm.completion(max_tokens=16, **chat)
    assert answer.choices[0].message.content == text, answer
    chunks = litellm.completion(max_tokens=16, stream=True, **chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    tool = {"type": "function", "function": {"name": "order", "parameters": PARAMETERS}}
    answer = litellm.completion(max_tokens=200, tools=[tool], tool_choice="required", **chat)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "order", answer
    history = [
        *chat["messages"],
        answer.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "Ordered."},
    ]
    answer = litellm.completion(max_tokens=16, **bridged, messages=history, tools=[tool])
    assert answer.choices[0].finish_reason, answer
