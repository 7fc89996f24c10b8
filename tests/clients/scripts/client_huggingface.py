# requires: huggingface_hub==2.4.0
"""huggingface_hub's InferenceClient: chat, streams, tools, typed answers, text_generation."""

import json
import os

from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
client = InferenceClient(base_url=URL, timeout=300)  # it names "dummy" as the model
ASK = [{"role": "user", "content": "Order a small hose."}]
SCHEMA = {
    "$defs": {"size": {"enum": ["small", "large"]}},
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/size"}},
    "required": ["size"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "order", "parameters": SCHEMA}}

for model in (None, MODEL, ADAPTER):
    answer = client.chat_completion(ASK, model=model, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content, answer
    chunks = client.chat_completion(ASK, model=model, max_tokens=12, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer.choices[0].message.content, pieces
answer = client.chat.completions.create(messages=ASK, model=ADAPTER, max_tokens=5)
assert answer.usage.completion_tokens == 5 or answer.choices[0].finish_reason == "stop", answer

named = {"function": {"name": "order"}}  # as the client's own class writes it, without a type
for choice in ("required", named, {"type": "function", **named}):
    answer = client.chat_completion(ASK, tools=[TOOL], tool_choice=choice, max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["size"] in ("small", "large"), call
answer = client.chat_completion(ASK, tools=[TOOL], tool_choice="auto", max_tokens=30)
assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer

for form in (
    {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}},
    {"type": "json_object"},
    {"type": "json_object", "value": SCHEMA},  # TGI's own
):
    answer = client.chat_completion(ASK, response_format=form, max_tokens=60, model=ADAPTER)
    if "value" in form or "json_schema" in form:
        assert json.loads(answer.choices[0].message.content)["size"], answer

whole = client.text_generation("Once upon a time", max_new_tokens=8, details=True)
assert whole.details.generated_tokens == 8, whole
pieces = list(client.text_generation("Once upon a time", max_new_tokens=8, stream=True))
assert "".join(pieces) == whole.generated_text, pieces
tuned = client.text_generation("Once upon a time", max_new_tokens=8, adapter_id=ADAPTER)
assert tuned != whole.generated_text, tuned

regex = {"type": "regex", "value": "[ab]{3}"}
for grammar, fits in ((regex, "ab"), ({"type": "json", "value": SCHEMA}, None)):
    text = client.text_generation("Order:", grammar=grammar, max_new_tokens=200)
    assert set(text) <= set(fits) if fits else json.loads(text)["size"], text
top = client.text_generation("Once", max_new_tokens=3, details=True, top_n_tokens=2).details
assert [len(tokens) for tokens in top.top_tokens] == [2, 2, 2], top
told = client.text_generation("Once", max_new_tokens=3, details=True, top_n_tokens=2, stream=True)
assert [len(event.top_tokens) for event in told] == [2, 2, 2]
try:
    client.text_generation("Hello", max_new_tokens=10_000_000)
    refused = None
except ValidationError as error:
    refused = error
assert "max_new_tokens" in str(refused), refused

try:
    client.chat_completion(ASK, model="nobody", max_tokens=5)
    refused = None
except Exception as error:
    refused = error
assert "404" in str(refused), refused
assert "nobody" in str(refused), refused
