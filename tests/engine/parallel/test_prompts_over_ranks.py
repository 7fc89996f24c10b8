"""Virtual tokens on two ranks: vectors answer as on one, keys and values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompt_adapters import TOKENS, learn
from rank_groups import answered, settings_of

from quickchange_server.errors import AdapterFailedError
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.store import Store


def test_vectors_answer_as_in_peft_on_two_ranks_and_keys_are_refused(tmp_path: Path) -> None:
    made = learn("llama", tmp_path, ["prompt tuning", "prefix tuning"])
    store = Store(tmp_path / "store")
    version = {name: store.add(name.replace(" ", "-"), a) for name, a in made.adapters.items()}
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)

    def submit(request_id: str, *names: str) -> Submit:
        adapters = [
            Component(v.digest, virtual_tokens=v.virtual_tokens)
            for v in (version[n] for n in names)
        ]
        text = tuple(made.texts[names[0]])
        return Submit(request_id, text, sampling, tuple(adapters), seed=0)

    wanted = [
        submit("vectors", "prompt tuning"),
        submit("with a LoRA", "prompt tuning", "lora"),
        submit("lora", "lora"),
    ]
    settings = settings_of(made.path, tmp_path / "store", 2)
    vectors, both, lora = answered(settings, wanted)
    for deltas, answer in (
        (vectors, made.alone["prompt tuning"]),
        (both, made.with_lora["prompt tuning"]),
        (lora, made.alone["lora"]),
    ):
        assert [token for delta in deltas for token in delta.token_ids] == answer
    with pytest.raises(AdapterFailedError, match="--tensor-parallel 1"):
        answered(settings, [submit("keys", "prefix tuning")])
