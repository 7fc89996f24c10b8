# requires: text-generation==0.7.0
"""TGI's client: generate and its stream, chat with tools, an error."""

import asyncio
import json
import os

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType, Message, Tool

URL = os.environ["URL"]
client = Client(URL, timeout=300)

answer = client.generate("Once upon a time", max_new_tokens=8)
assert answer.details.generated_tokens == 8, answer
events = list(client.generate_stream("Once upon a time", max_new_tokens=8))
assert "".join(event.token.text for event in events) == answer.generated_text, events
asked = AsyncClient(URL, timeout=300).generate("Once upon a time", max_new_tokens=8)
assert asyncio.run(asked).generated_text == answer.generated_text
full = client.generate("Once", max_new_tokens=8, do_sample=True, seed=3, return_full_text=True)
assert full.generated_text.startswith("Once"), full

grammar = Grammar(type=GrammarType.Regex, value="[ab]{3}")
text = client.generate("Order:", grammar=grammar, max_new_tokens=60).generated_text
assert set(text) <= set("ab"), text
top = client.generate("Once", max_new_tokens=3, top_n_tokens=2).details.top_tokens
assert [len(tokens) for tokens in top] == [2, 2, 2], top

ask = [Message(role="user", content="Order a small hose.")]
chat = client.chat(ask, max_tokens=8, temperature=0)  # it names "tgi" as the model
assert chat.choices[0].message.content, chat

schema = {"type": "object", "properties": {"size": {"enum": ["s", "l"]}}}
schema |= {"required": ["size"], "additionalProperties": False}
tool = Tool(type="function", function={"name": "order", "parameters": schema})
chat = client.chat(ask, max_tokens=60, tools=[tool], tool_choice="required")
(call,) = chat.choices[0].message.tool_calls
assert json.loads(call["function"]["arguments"])["size"] in ("s", "l"), call

try:
    client.generate("Hello", max_new_tokens=10_000_000)
    refused = None
except ValidationError as error:
    refused = error
assert "max_new_tokens" in str(refused), refused
