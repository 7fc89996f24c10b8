# requires: lorax-client==0.6.3
"""lorax-client: generate, streams, merged adapters, JSON, and its routes for OpenAI's fields."""

import asyncio
import json
import os

from lorax import AsyncClient, Client
from lorax.types import MergedAdapters

URL, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "MODEL", "ADAPTER"))
client = Client(URL, timeout=300)
SCHEMA = {
    "$defs": {"size": {"enum": ["small", "large"]}},
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/size"}},
    "required": ["size"],
    "additionalProperties": False,
}

for adapter in (None, ADAPTER):
    answer = client.generate("Once upon a time", adapter_id=adapter, max_new_tokens=8)
    assert answer.details.generated_tokens == 8, answer
    events = list(client.generate_stream("Once upon a time", adapter_id=adapter, max_new_tokens=8))
    assert "".join(event.token.text for event in events) == answer.generated_text, events
    assert events[-1].generated_text == answer.generated_text, events[-1]
mixed = MergedAdapters(ids=[ADAPTER], weights=[1.0], merge_strategy="linear", density=1.0)
assert (
    client.generate("Once upon a time", merged_adapters=mixed, max_new_tokens=8).generated_text
    == answer.generated_text
)
asked = AsyncClient(URL, timeout=300).generate("Once", adapter_id=ADAPTER, max_new_tokens=4)
assert asyncio.run(asked).generated_text

text = client.generate(
    "Order a small hose.",
    response_format={"type": "json_object", "schema": SCHEMA},
    max_new_tokens=40,
).generated_text
assert json.loads(text)["size"] in ("small", "large"), text

try:
    client.generate("Hello", adapter_id="owner/nobody")
    refused = None
except Exception as error:
    refused = error
assert "nobody" in str(refused), refused
