"""Adapters that add tokens are served by two ranks as by PEFT, beside plain rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_support import tokens_of
from engine_driver import request
from grown_vocabulary import save_base, train_grown
from peft import LoraConfig
from rank_groups import answered, settings_of
from tiny_models import VOCABULARY, greedy, make_model

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_two_ranks_read_and_write_added_tokens(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = train_grown(base, tmp_path / "grown", config)
    store = Store(tmp_path / "store")
    added = add_adapter(store, "grown", tmp_path / "grown", base_spec(str(base)))
    prompt = [5, VOCABULARY, 7, VOCABULARY + 1]
    wanted = [
        request("grown", prompt, [(added.version.digest, 1.0)], max_tokens=8),
        request("plain", prompt[::2], max_tokens=8),
    ]
    settings = settings_of(base, tmp_path / "store", 2, extra_vocabulary=3)
    own, plain = answered(settings, wanted)
    assert tokens_of(own) == greedy(model, prompt, 8)
    assert tokens_of(plain) == greedy(make_model(family), prompt[::2], 8)
