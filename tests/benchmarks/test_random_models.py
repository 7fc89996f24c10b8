"""Models and adapters with random weights, against transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from quickchange_bench.load.workload import make_prompt
from quickchange_bench.models.random_adapters import (
    PROJECTIONS,
    AdapterSpec,
    device_bytes,
    linear_shapes,
    write_in_this_process,
)
from quickchange_bench.models.random_base import SHAPES, vocabulary, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, SHAPES["tiny"], dtype="float32", seed=0)
    return folder


def test_a_prompt_has_the_tokens_that_were_asked_for(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [make_prompt(0, i, 64) for i in range(20)]
    assert {len(ids) for ids in tokenizer(prompts).input_ids} == {64}


def test_every_token_has_a_text_of_its_own(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [tokenizer.decode([k]) for k in range(2, 1024)]
    assert all(texts)
    assert len(set(texts)) == len(texts)


def test_a_vocabulary_without_room_for_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 10"):
        vocabulary(10)


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_random_adapters_are_pefts_and_change_the_output(base: Path, tmp_path: Path) -> None:
    shapes = write_in_this_process(base, tmp_path, ["a", "b"], AdapterSpec(rank=4))
    assert shapes == linear_shapes(base, PROJECTIONS)
    ids = torch.arange(2, 12)[None]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = plain(ids).logits
    model = PeftModel.from_pretrained(plain, str(tmp_path / "a"), adapter_name="a").eval()
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    with torch.inference_mode():
        first = model(ids).logits
        model.set_adapter("b")
        second = model(ids).logits
    assert not torch.allclose(first, expected, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-4)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 4


def test_unknown_projections_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="wqkv"):
        linear_shapes(base, ("wqkv",))


def test_ranks_are_padded_to_pages_on_the_device() -> None:
    shapes = {"m": (10, 20)}
    assert device_bytes(shapes, 4, 4) == device_bytes(shapes, 8, 4) == 8 * 30 * 4
    assert device_bytes(shapes, 9, 2) == 16 * 30 * 2
