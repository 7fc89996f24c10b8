"""Adapters on models that need a shim: attention of their own, transposed or other linears."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_peft import served, train
from peft import LoraConfig

# One of each kind of linear: Conv1D, Falcon's subclass, one module for q, k and v, three modules.
FAMILIES = [
    "bart",
    "bloom",
    "codegen",
    "falcon",
    "falcon-7b",
    "gpt2",
    "gpt_neo",
    "openai-gpt",
    "xglm",
]
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_every_linear_equals_peft(family: str, tmp_path: Path) -> None:
    trained = train(family, tmp_path, {"lora": LoraConfig(r=4, **ALL)})
    assert trained.answers != trained.plain
    tokens = served(trained)
    assert tokens == {**trained.answers, "plain/lora": trained.plain["lora"]}


def test_dora_on_conv1d_equals_peft(tmp_path: Path) -> None:
    """Its gain is a norm over a row of the weight, which Conv1D keeps as a column."""
    trained = train("gpt2", tmp_path, {"dora": LoraConfig(r=4, use_dora=True, **ALL)})
    assert trained.answers != trained.plain
    assert served(trained)["dora"] == trained.answers["dora"]
