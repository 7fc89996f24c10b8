"""What lorax-client itself says of a server: python lorax_script.py URL CASE… prints JSON.

Runs in an environment of its own (the client needs an older huggingface-hub), so it imports
nothing of this project.
"""

# mypy: ignore-errors

import asyncio
import json
import sys

from lorax import AsyncClient, Client
from lorax.types import MergedAdapters

PROMPT = "Hello"
SECONDS = 600  # of which an answer takes less than one, on a machine that is not busy
PLAIN = {"max_new_tokens": 6, "seed": 3}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def merged(strategy, *ids):
    return MergedAdapters(ids=list(ids), weights=[0.5, 2.0], merge_strategy=strategy, density=0.5)


def sync(**parameters):
    return lambda url: (
        Client(url, timeout=SECONDS).generate(PROMPT, **parameters).model_dump(mode="json")
    )


def streamed(**parameters):
    def run(url):
        events = Client(url, timeout=SECONDS).generate_stream(PROMPT, **parameters)
        return [event.model_dump(mode="json") for event in events]

    return run


def asynchronous(**parameters):
    def run(url):
        answer = asyncio.run(AsyncClient(url, timeout=SECONDS).generate(PROMPT, **parameters))
        return answer.model_dump(mode="json")

    return run


def asynchronously_streamed(**parameters):
    async def collect(url):
        events = AsyncClient(url, timeout=SECONDS).generate_stream(PROMPT, **parameters)
        return [event.model_dump(mode="json") async for event in events]

    return lambda url: asyncio.run(collect(url))


CASES = {
    "plain": sync(**PLAIN),
    "no details": sync(details=False, **PLAIN),
    "adapter": sync(adapter_id="team/sql", **PLAIN),
    "adapter from hub": sync(
        adapter_id="team/sql", adapter_source="hub", api_token="secret", **PLAIN
    ),
    "stream": streamed(adapter_id="team/sql", **PLAIN),
    "async": asynchronous(adapter_id="team/sql", **PLAIN),
    "async stream": asynchronously_streamed(adapter_id="team/sql", **PLAIN),
    "everything": sync(
        adapter_id="team/sql",
        adapter_source="local",
        do_sample=True,
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.1,
        return_full_text=True,
        stop_sequences=["zzz", "yyy"],
        truncate=3,
        ignore_eos_token=True,
        decoder_input_details=True,
        return_k_alternatives=1,
        **PLAIN,
    ),
    "best of": sync(best_of=3, do_sample=True, max_new_tokens=4),
    "linear": sync(merged_adapters=merged("linear", "team/sql", "json"), **PLAIN),
    "ties": sync(merged_adapters=merged("ties", "team/sql", "json"), **PLAIN),
    "json": sync(
        response_format={"type": "json_object", "schema": SCHEMA},
        adapter_id="team/sql",
        **PLAIN,
    ),
    "json stream": streamed(response_format={"type": "json_object", "schema": SCHEMA}, **PLAIN),
    "bad schema": sync(response_format={"type": "json_object", "schema": {"type": "objekt"}}),
    "merged stream": streamed(merged_adapters=merged(None, "team/sql", "json"), **PLAIN),
    "unknown adapter": sync(adapter_id="owner/unknown"),
    "unknown adapter, stream": streamed(adapter_id="owner/unknown"),
    "unknown adapter, async": asynchronous(adapter_id="owner/unknown"),
    "five stops": sync(stop_sequences=list("abcde")),
    "watermark": sync(watermark=True),
    "too long": asynchronous(max_new_tokens=100_000),
    "too long, stream": asynchronously_streamed(max_new_tokens=100_000),
    "embed": lambda url: Client(url, timeout=SECONDS).embed("x").model_dump(mode="json"),
    "classify": lambda url: Client(url, timeout=SECONDS).classify("x").model_dump(mode="json"),
    "long": streamed(max_new_tokens=50, seed=3),
}


def outcome(url, case):
    try:
        return {"answer": CASES[case](url)}
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    url, *cases = sys.argv[1:]
    print(json.dumps({case: outcome(url, case) for case in cases or CASES}))
