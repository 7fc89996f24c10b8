"""A forward pass shows the hidden states that enter the LM head, beside the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_model, save_model
from torch import nn

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.forward_context import AttentionBatch, ForwardContext
from quickchange_server.model.loading.model_loader import HeadInput, forward, load_model, prepare
from quickchange_server.model.paged_attention import PagedAttention

CPU = torch.device("cpu")
ROWS = 6


def causal() -> ForwardContext:
    """One sequence of ROWS rows in the first blocks of the cache."""
    return ForwardContext(
        AttentionBatch(
            slots=torch.arange(ROWS),
            block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
            seq_lens=torch.tensor([ROWS], dtype=torch.int32),
            query_start=torch.tensor([0, ROWS], dtype=torch.int32),
        ),
        None,
    )


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_that_transformers_head_reads(
    family: str, adapters: bool, tmp_path: Path
) -> None:
    original = make_model(family)
    path = str(save_model(family, tmp_path))
    model = load_model(path, dtype=torch.float32, device=CPU, adapters=adapters)
    pages = PagedAttention(model.layers, 4, 4, torch.float32, CPU, model.holder)
    paged_attention.install(model.module, pages)
    ids, rows = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([5, 2])
    model.holder.step = causal()
    output = forward(model, ids, torch.arange(ROWS), rows)
    model.holder.step = None
    entered: list[torch.Tensor] = []
    original.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: entered.append(args[0])
    )
    with torch.inference_mode():
        expected = original(input_ids=ids[None], use_cache=False).logits[0, rows]
    assert output.hidden.shape == (2, model.hidden)
    torch.testing.assert_close(output.hidden, entered[0][0, rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_an_lm_head_is_refused_by_name() -> None:
    paged_attention.register()
    model = make_model("llama")
    model.set_attn_implementation(paged_attention.NAME)
    model.lm_head = None
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no module"):
        prepare(model, adapters=True)


def test_states_are_kept_for_one_pass_alone() -> None:
    head = nn.Linear(3, 5)
    states = HeadInput(head)
    head(torch.ones(1, 2, 3))
    assert torch.equal(states.take(), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="without calling its LM head"):
        states.take()
