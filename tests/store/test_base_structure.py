"""What is found out about a base model's structure, by what it computes and how it names parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quickchange_store.base_model.sublayers import producers, sublayers


class Gated(nn.Module):
    """An MLP with the parts of a gated one, and a change to it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 20, bias=change == "biases")
        self.up_proj = nn.Linear(8, 20, bias=change == "biases")
        self.down_proj = nn.Linear(20, 8, bias=change == "biases")
        self.norm = nn.LayerNorm(20) if change == "norm" else None
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        if self.change == "clamped":
            up = up.clamp(-0.1, 0.1)
        inner = nn.functional.silu(self.gate_proj(x)) * up
        if self.change == "added":
            inner = inner + self.gate_proj(x)
        return self.down_proj(inner if self.norm is None else self.norm(inner))


@pytest.mark.parametrize("change", ["none", "biases"])
def test_a_gated_mlp_is_recognised_without_its_weights(change: str) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": Gated(change)})
    assert producers(model) == {"mlp.down_proj": "mlp.up_proj"}


@pytest.mark.parametrize("change", ["norm", "clamped", "added"])
def test_an_mlp_that_only_looks_gated_is_not(change: str) -> None:
    assert producers(nn.ModuleDict({"mlp": Gated(change)})) == {}


def test_sublayers_of_a_llama_enter_through_its_two_norms(bases: Any) -> None:
    found = bases("llama").spec.sublayers
    assert len(found) == 4
    attention = found["model.layers.1.self_attn.o_proj"]
    mlp = found["model.layers.1.mlp.down_proj"]
    assert (attention.layer, attention.kind) == (1, "attention")
    assert attention.norm == "model.layers.1.input_layernorm"
    assert mlp.norm == "model.layers.1.post_attention_layernorm"
    assert attention.plain_stream
    assert mlp.plain_stream


def test_norms_behind_the_sublayers_are_noticed(bases: Any) -> None:
    found = sublayers(bases("gemma3").model)
    mlp = found["model.layers.0.mlp.down_proj"]
    assert mlp.norm == "model.layers.0.pre_feedforward_layernorm"
    assert not any(place.plain_stream for place in found.values())


class Layer(nn.Module):
    """A layer of Llama's names with some of its norms, whose MLP ends in one module or doesn't."""

    def __init__(self, norms: list[str], *, experts: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"o_proj": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"gate" if experts else "down_proj": nn.Linear(4, 4)})
        for norm in norms:
            setattr(self, norm, nn.LayerNorm(4))


PLAIN = ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize(
    "norms",
    [
        [],
        ["input_layernorm"],
        ["post_attention_layernorm", "post_feedforward_layernorm"],
        [*PLAIN, "pre_mlp_layernorm", "post_mlp_layernorm"],
        [*PLAIN, "post_self_attn_layernorm"],
    ],
)
def test_a_layer_with_other_norms_shows_no_stream(norms: list[str]) -> None:
    found = sublayers(nn.ModuleDict({"layers": nn.ModuleList([Layer(norms)])}))
    assert {place.norm for place in found.values()} == {None}
    assert not any(place.plain_stream for place in found.values())


def test_experts_end_no_sublayer() -> None:
    layer = Layer(PLAIN, experts=True)
    found = sublayers(nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    assert list(found) == ["layers.0.self_attn.o_proj"]
    assert found["layers.0.self_attn.o_proj"].norm == "layers.0.input_layernorm"


def test_other_names_are_no_sublayers(bases: Any) -> None:
    assert bases("gpt_neox").spec.sublayers == {}
