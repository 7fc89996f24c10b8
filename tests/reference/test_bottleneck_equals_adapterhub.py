"""Bottleneck adapters through the engine answer as AdapterHub's own library did, token for token.

The answers are recorded (adapterhub/record.py): the library needs another transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver, make_engine, request
from formula_weights import fill, formula_tensor
from safetensors.torch import save_file
from tiny_models import greedy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.importing import read_adapter

RECORDED = json.loads((Path(__file__).parent / "adapterhub" / "answers.json").read_text())
SOURCES = {
    "houlsby": "output",
    "pfeiffer": "stream",
    "parallel": "residual",
    "residual-inside": "stream",
}


def make_base(family: str, folder: Path) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **RECORDED["sizes"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    fill(model, RECORDED["std"])
    model.save_pretrained(folder)
    return model


def imported(name: str, recorded: dict[str, Any], folder: Path, spec: BaseSpec) -> CanonicalAdapter:
    """The adapter that the library saved, from its configuration and its tensors' names."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(recorded["config"]))
    tensors = {
        key: formula_tensor(key, tuple(shape), RECORDED["std"])
        for key, shape in recorded["shapes"].items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    adapter = read_adapter(folder, spec).adapter
    if name in SOURCES:
        assert {update.source for update in adapter.updates.values()} == {SOURCES[name]}
    return adapter


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_bottleneck_adapters_answer_as_in_adapterhub(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path / "base")
    spec = base_spec(str(tmp_path / "base"))
    recorded = RECORDED["families"][family]
    loaded = {
        name: imported(name, entry, tmp_path / name, spec) for name, entry in recorded.items()
    }
    engine = make_engine(
        tmp_path / "base", loaded.__getitem__, max_sequences=20, max_batch_tokens=40
    )
    drive = Driver(engine)
    expected: dict[str, list[int]] = {}
    for name, entry in recorded.items():
        for index, answer in enumerate(entry["answers"]):
            key = f"{name}/{index}"
            expected[key] = answer["tokens"]
            expected[f"plain/{key}"] = greedy(model, answer["prompt"], 10)
            engine.submit(request(key, answer["prompt"], [(name, 1.0)]))
            engine.submit(request(f"plain/{key}", answer["prompt"]))
    drive.finish(*expected)
    engine.close()
    for key, tokens in expected.items():
        assert drive.tokens[key] == tokens, key
    for name in recorded:
        assert any(expected[f"{name}/{i}"] != expected[f"plain/{name}/{i}"] for i in range(3))
