"""What a shim can't serve is refused with its reason; positions end where the model has none."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model
from transformers import AutoConfig

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.architectures.attention_shims import replace_own_attention
from quickchange_server.model.architectures.batch_shims import (
    HeadRows,
    linears_of_conv1d,
    most_positions,
)


@pytest.mark.parametrize(
    ("kind", "sizes", "tokens"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("whisper", {"max_target_positions": 77}, 77),
        ("bloom", {}, 1 << 20),  # names no limit
    ],
)
def test_limit_of_positions_goes_by_the_name_that_the_configuration_gives_it(
    kind: str, sizes: dict[str, int], tokens: int
) -> None:
    assert most_positions(torch.nn.Module(), AutoConfig.for_model(kind, **sizes)) == tokens


def test_positions_begin_behind_the_padding_token_in_roberta() -> None:
    model = make_model("roberta")
    assert most_positions(model, model.config) == 512 - 96 - 1


def test_doge_is_served_up_to_where_it_leaves_keys_out() -> None:
    model = make_model("doge")
    model.config.keep_window_size = 64
    assert most_positions(model, model.config) == 64


def test_xlm_that_is_not_causal_is_refused() -> None:
    model = make_model("xlm")
    model.transformer.causal = False
    replace_own_attention(model)
    with pytest.raises(UnsupportedModelError, match="causal"):
        model(input_ids=torch.tensor([[3, 4]]), position_ids=torch.tensor([[0, 1]]))


@torch.inference_mode()
def test_conv1d_becomes_a_linear_that_computes_the_same() -> None:
    model = make_model("gpt2")
    ids = torch.arange(9)[None]
    before = model(input_ids=ids).logits
    linears_of_conv1d(model)
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn"), torch.nn.Linear)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_head_of_a_model_without_logits_to_keep_reads_the_asked_rows_alone() -> None:
    model = make_model("whisper")
    ids = torch.arange(9)[None]
    whole = model(input_ids=ids).logits
    rows = HeadRows(model)
    rows.attach(model.get_output_embeddings())
    asked = torch.tensor([7, 2])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=asked).logits, whole[:, asked])
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=1).logits, whole[:, -1:])
    rows.attach(model.get_output_embeddings())  # again: one cut, not two
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=asked).logits, whole[:, asked])
