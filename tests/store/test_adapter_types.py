"""Every type of PEFT is served exactly, on request or refused with a reason, as the table says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import save_file

from quickchange_store.errors import StoreError, UnsupportedFeatureError
from quickchange_store.formats.tuners.tuner_types import EXACT, ON_REQUEST, REFUSED
from quickchange_store.importing import read_adapter

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapter-types.md"
KINDS = sorted(kind.value for kind in PeftType)
ROW = re.compile(r"^\| `(\w+)` \| (exactly|on request|refused)\b", re.M)


def test_each_type_is_in_one_group() -> None:
    groups = [*EXACT, *ON_REQUEST, *REFUSED]
    assert sorted(groups) == KINDS


def test_the_documents_table_says_what_becomes_of_each_type() -> None:
    becomes = {
        **dict.fromkeys(EXACT, "exactly"),
        **dict.fromkeys(ON_REQUEST, "on request"),
        **dict.fromkeys(REFUSED, "refused"),
    }
    assert dict(ROW.findall(DOCUMENT.read_text())) == becomes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of no type yet, with a tensor that no type has."""
    save_file({"base_model.model.x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", [*ON_REQUEST, *REFUSED])
def test_a_type_that_is_not_served_is_refused_with_its_own_reason(
    kind: str, folder: Path, bases: Any
) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedFeatureError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert (caught.value.file, caught.value.key) == ("adapter_config.json", "peft_type")
    why, remedy = REFUSED.get(kind, ("full rank", "--approximate-rank"))
    assert why in str(caught.value)
    assert remedy in str(caught.value.remedy)


@pytest.mark.parametrize("kind", EXACT)
def test_a_served_type_is_never_refused_for_its_type(kind: str, folder: Path, bases: Any) -> None:
    config = {"peft_type": kind, "target_modules": ["q_proj"], "token_indices": [1]}
    if kind != "TRAINABLE_TOKENS":
        del config["token_indices"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError) as caught:  # its tensors are missing
        read_adapter(folder, bases("llama").spec)
    assert caught.value.key != "peft_type"
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["LATER", 5, ["LORA"], {}])
def test_a_type_that_peft_does_not_have_is_refused(kind: Any, folder: Path, bases: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, bases("llama").spec)
    assert caught.value.key == "peft_type"
