"""Seam one: what models pass to their attention is served, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_model
from transformers import AttentionInterface

from quickchange_kernels.attention.paged_attention_contract import reference_paged_attention
from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.forward_context import AttentionBatch, ForwardContext, StepHolder
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.model.paged_attention import (
    LayerShape,
    PagedAttention,
    ShapeRecorder,
    bytes_per_block,
)

CPU = torch.device("cpu")


def module(**attributes: bool) -> SimpleNamespace:
    """What attention needs of a module: layer 0, and these attributes."""
    return SimpleNamespace(
        layer_idx=0, **{paged_attention.ATTRIBUTE: ShapeRecorder()}, **attributes
    )


def call(**options: Any) -> torch.Tensor:
    """Calls the interface as a model does, on three tokens of two heads."""
    paged_attention.register()
    interface = AttentionInterface()[paged_attention.NAME]
    caller = options.pop("module", None) or module()
    given: dict[str, Any] = {
        "query": torch.zeros(1, 2, 3, 8),
        "key": torch.zeros(1, 1, 3, 8),
        "value": torch.zeros(1, 1, 3, 5),
        "attention_mask": None,
        **options,
    }
    names = ("query", "key", "value", "attention_mask")
    out, none = interface(caller, *(given.pop(name) for name in names), **given)
    assert none is None
    assert isinstance(out, torch.Tensor)
    return out


def test_values_give_the_output_its_width() -> None:
    assert call().shape == (1, 3, 2, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"position_bias": torch.zeros(1)}, "gives the argument 'position_bias'"),
        ({"indices": torch.zeros(1)}, "gives the argument 'indices'"),
        ({"sinks": torch.zeros(1, 2, 3, 1)}, "gives the argument 'sinks'"),
        ({"something_new": 0.5}, "gives the argument 'something_new'"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "makes an attention mask"),
        ({"is_causal": False}, r"see those that follow them \(is_causal\)"),
        ({"module": module(is_causal=False)}, r"see those that follow them \(is_causal\)"),
        ({"query": torch.zeros(2, 2, 3, 8)}, "cuts the batch in 2"),
        ({"key": torch.zeros(1, 1, 7, 8)}, r"layer 0 .* for 3 tokens"),
        ({"value": torch.zeros(1, 2, 3, 5)}, "must have the same heads"),
        ({"module": SimpleNamespace()}, "has no layer_idx"),
    ],
)
def test_what_would_change_the_result_is_refused_by_its_name(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        call(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"position_ids": torch.zeros(1, 3), "use_cache": True},
        {"position_bias": None, "output_attentions": False},
        {"is_causal": True, "dropout": 0.0},
        {"module": module(is_causal=False, is_decoder=True)},
    ],
)
def test_what_changes_nothing_is_passed_by(options: dict[str, Any]) -> None:
    call(**options)


def test_a_layer_that_attends_twice_is_refused() -> None:
    recorder, x = ShapeRecorder(), torch.zeros(3, 2, 8)
    recorder(0, x, x, x, scale=1.0)
    with pytest.raises(UnsupportedModelError, match="layer 0 attends more than once"):
        recorder(0, x, x, x, scale=1.0)


def test_layers_that_pass_anothers_keys_and_values_have_no_pages(tmp_path: Path) -> None:
    path = str(save_model("gemma3n", tmp_path))
    model = load_model(path, dtype=torch.float32, device=CPU, adapters=False)
    assert [shape.shares for shape in model.layers.values()] == [None, None, 0, 1]
    alone = {layer: shape for layer, shape in model.layers.items() if shape.shares is None}
    size = bytes_per_block(model.layers, 4, torch.float32)
    assert size == bytes_per_block(alone, 4, torch.float32) == 2 * 2 * (16 + 16) * 4 * 4


def test_equal_keys_and_values_that_are_not_the_same_have_their_own_pages() -> None:
    recorder, x = ShapeRecorder(), torch.ones(3, 2, 8)
    recorder(0, x, x, x, scale=1.0)
    recorder(1, x, x, x.clone(), scale=1.0)
    recorder(2, x, x, x, scale=1.0)
    assert [shape.shares for shape in recorder.layers.values()] == [None, None, 0]


def test_a_sharing_layer_reads_the_pages_of_the_other_and_writes_none() -> None:
    """Layer 1 shares; sinks are in bfloat16, as a model of that dtype has them."""
    shapes = {0: LayerShape(1, 8, 5), 1: LayerShape(1, 8, 5, shares=0)}
    holder = StepHolder()
    pages = PagedAttention(shapes, 2, 4, torch.float32, CPU, holder)
    batch = AttentionBatch(
        slots=torch.arange(3),
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        query_start=torch.tensor([0, 3], dtype=torch.int32),
    )
    holder.step = ForwardContext(batch, None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, *shape, generator=generator) for shape in ((2, 8), (1, 8), (1, 5)))
    own = pages(0, q, k, v, scale=0.3)
    sinks = torch.tensor([0.5, -1.0]).bfloat16()
    shared = pages(1, q, torch.full_like(k, 9), torch.full_like(v, 9), scale=0.3, sinks=sinks)
    assert torch.equal(pages(1, q, k, v, scale=0.3), own)
    k_cache, v_cache = (x.transpose(0, 1)[None] for x in (k, v))  # [1, Hkv, 3, D]
    index = (batch.block_tables, batch.seq_lens, batch.query_start)
    expected = reference_paged_attention(q, k_cache, v_cache, *index, 0.3, 0, 0.0, sinks)
    torch.testing.assert_close(shared, expected.float())
