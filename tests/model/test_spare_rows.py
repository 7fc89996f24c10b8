"""Spare rows of the base's ends: what is put there, what stays tied, which models have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import VOCABULARY, make_model, save_model

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.model.loading.spare_tokens import add_spare_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi"])
def test_rows_of_zero_stand_behind_the_bases_and_tied_ends_stay_one(family: str) -> None:
    model, original = make_model(family), make_model(family)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    add_spare_tokens(model, 5)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.weight is embedding.weight) == tied
    for end, before in (
        (embedding, original.get_input_embeddings()),
        (head, original.get_output_embeddings()),
    ):
        assert torch.equal(end.weight[:VOCABULARY], before.weight)
        assert end.weight.shape[0] == VOCABULARY + 5
        assert not end.weight[VOCABULARY:].any()
        if getattr(before, "bias", None) is not None:
            assert torch.equal(end.bias[:VOCABULARY], before.bias)
            assert not end.bias[VOCABULARY:].any()


def test_a_model_that_reads_token_ids_elsewhere_too_is_refused(tmp_path: Path) -> None:
    path = save_model("gemma3n", tmp_path)
    with pytest.raises(UnsupportedModelError, match="extra_vocabulary"):
        load_model(str(path), dtype=torch.float32, device=CPU, adapters=True, extra_vocabulary=64)


def test_an_int8_base_says_the_same_with_spare_rows(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    said = []
    for spare in (0, 64):
        drive = Driver(make_engine(path, quantization="int8", extra_vocabulary=spare))
        drive.engine.submit(request("a", [1, 2, 3], max_tokens=20))
        drive.finish("a")
        drive.engine.close()
        said.append(drive.tokens["a"])
    assert said[0] == said[1]
