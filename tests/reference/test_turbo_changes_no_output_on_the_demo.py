"""On the demo's base, its adapters say with drafts what they say without, sampled and greedy.

Real prompts and a real vocabulary, drafts bought as the server buys them, sixteen requests at once
against each alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.entrypoints.in_process_engine import InProcessEngine
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Component, Drafting, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.store import Store
from quickchange_training.adapters.adapter_job import load_tokenizer
from quickchange_training.demo import DEMO_ADAPTERS, ensure_demo_base, publish_demo_adapters
from quickchange_training.demo.tasks import TASKS
from quickchange_training.examples import encode_prompt

REQUESTS = 24
NEW_TOKENS = 48
WAYS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.15, "min_tokens": 20},
    {"temperature": 1.0, "presence_penalty": 0.4, "frequency_penalty": 0.2, "top_k": 40},
)


def drafter(store: Store, name: str) -> str | None:
    """Digest of the heads of the demo adapter `name`, where it has some."""
    heads = (f"{name}-turbo", f"{name}-heads")
    known = [found for found in heads if found in (*store.names(), *store.aliases())]
    return store.resolve(known[0]).turbo if known else None


def demo_requests(model: Path, store: Store) -> list[Submit]:
    """Adapters, prompts and ways of sampling in turn, each with all the drafts that it can have."""
    tokenizer = load_tokenizer(str(model))
    eos = Text.load(str(model)).eos_ids
    names = [*DEMO_ADAPTERS, None]
    requests = []
    for index in range(REQUESTS):
        name = names[index % len(names)]
        example = TASKS[name or "sql"].examples("held-out", REQUESTS, seed=1)[index]
        components = () if name is None else (Component(store.resolve(name).digest),)
        requests.append(
            Submit(
                str(index),
                prompt=tuple(
                    encode_prompt([{"role": "user", "content": example.prompt}], tokenizer)
                ),
                sampling=SamplingParams(
                    max_tokens=NEW_TOKENS,
                    stop_token_ids=eos,
                    **WAYS[index // len(names) % len(WAYS)],
                ),
                adapters=components,
                drafting=Drafting(drafter(store, name or "base"), lookup=True),
                seed=index,
            )
        )
    return requests


@pytest.mark.slow
def test_drafts_change_no_token_of_the_demo_adapters(tmp_path: Path) -> None:
    model = ensure_demo_base()
    store = Store(tmp_path / "store")
    publish_demo_adapters(store, base_spec(model))
    requests = demo_requests(model, store)
    settings = Settings.model_validate({"model": str(model), "store": Path(store.location)})
    with InProcessEngine(settings, text=token_text(settings.model)) as engine:
        drafted = engine.run(requests, concurrency=16)
    undrafted = Settings.model_validate({**settings.model_dump(), "turbo": False})
    with InProcessEngine(undrafted) as engine:
        alone = engine.run(requests, concurrency=1)
    assert sum(completion.accepted for completion in drafted.completions) > 20
    for index, (found, expected) in enumerate(
        zip(drafted.completions, alone.completions, strict=True)
    ):
        assert found.token_ids == expected.token_ids, index
        assert found.finish_reason == expected.finish_reason, index
    assert not any(completion.drafted for completion in alone.completions)
