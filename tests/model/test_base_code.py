"""A base model's own code is never run, nor is anybody asked whether to run it."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quickchange_server.errors import SettingError, UnsupportedModelError
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.model.loading.model_loader import load_model
from quickchange_store.base_model.base_spec import BaseModelError, base_spec

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
"""


def load_weights(folder: str) -> None:
    load_model(folder, dtype=torch.float32, device=torch.device("cpu"), adapters=True)


@pytest.mark.parametrize(
    ("load", "refusal"),
    [(Text.load, SettingError), (load_weights, UnsupportedModelError), (base_spec, BaseModelError)],
)
def test_a_model_that_brings_code_is_refused(
    load: Callable[[str], object],
    refusal: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(CODE)
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    with pytest.raises(refusal, match="custom code"):
        load(str(tmp_path))
    assert asked == []
    assert list(tmp_path.glob("**/ran")) == []
