"""Recurrent layers as they are found at load, what is refused, and Mamba-1's scan from a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recurrent_models import make_recurrent
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mamba import modeling_mamba

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.architectures.recurrent_layers import (
    RecurrentLayer,
    bytes_per_state,
    noting_states,
)
from quickchange_server.model.architectures.recurrent_scan import ScanFromState
from quickchange_server.model.loading.model_loader import LoadedModel, prepare


def prepared(kind: str, *, positions: bool = True) -> LoadedModel:
    paged_attention.register()
    model = make_recurrent(kind)
    if not positions:
        del model.config.max_position_embeddings
    model.set_attn_implementation(paged_attention.NAME)
    return prepare(model, adapters=True)


@pytest.mark.parametrize(
    ("kind", "recurrent", "attention"),
    [("qwen3_5_text", [0], [1]), ("falcon_h1", [0, 1], [0, 1]), ("zamba", [0, 1, 2], [0, 2])],
)
def test_layers_are_found_by_what_they_keep(
    kind: str, recurrent: list[int], attention: list[int]
) -> None:
    loaded = prepared(kind)
    assert [layer.layer for layer in loaded.recurrent] == recurrent
    assert sorted(loaded.layers) == attention


def test_states_have_the_shapes_that_the_layers_leave() -> None:
    loaded = prepared("mamba2")
    window, matrix = (64 + 2 * 2 * 8) * 4, 4 * 16 * 8  # of the convolution; of four heads
    assert bytes_per_state(loaded.recurrent) == 2 * (window + matrix) * 4


def test_a_model_without_positions_names_no_limit_that_a_prompt_meets() -> None:
    assert prepared("mamba", positions=False).max_positions > 1e6


class Layer(nn.Module):
    """A running sum over the rows, kept in a cache; or what a layer must not do."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.layer_idx = 0
        self.fault = fault

    def forward(self, hidden_states: Tensor, cache_params: Any = None) -> Tensor:
        if self.fault == "unknown":
            cache_params.update_ssm_state(hidden_states)
        before = cache_params.get_recurrent_state(0)
        sums = hidden_states.cumsum(1)
        if before is not None and self.fault != "forgetful":
            sums = sums + before[:, None]
        cache_params.update_recurrent_state(sums[:, -1], layer_idx=0)
        return sums


def found(fault: str) -> tuple[RecurrentLayer, ...]:
    model = nn.Sequential(Layer(fault))
    with noting_states(model) as put_in:
        model(torch.ones(1, 1, 3))
    return put_in()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("forgetful", "Layer forgets what came before a chunk of tokens"),
        ("unknown", r"Layer keeps state .* not supported yet \(its cache's update_ssm_state\)"),
    ],
)
def test_a_layer_that_does_otherwise_is_refused_by_name(fault: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        found(fault)


def test_a_sound_layer_is_taken() -> None:
    (layer,) = found("none")
    assert layer.shapes[("recurrent", 0)].size == (3,)


@given(
    rows=st.integers(2, 12),
    cut=st.integers(1, 11),
    gated=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_scan_in_two_parts_gives_what_one_does(
    rows: int, cut: int, gated: bool, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, width, size = 2, 5, 3
    cut = min(cut, rows - 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, dt, z = (random(batch, width, rows) for _ in range(3))
    B, C = random(batch, size, rows), random(batch, size, rows)
    A, D, bias = -random(width, size).exp(), random(width), random(width)

    def over(begin: int, end: int, scan: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = scan(
            hidden[..., begin:end],
            dt[..., begin:end],
            A,
            B[..., begin:end],
            C[..., begin:end],
            D=D,
            z=z[..., begin:end] if gated else None,
            delta_bias=bias if biased else None,
            delta_softplus=True,
            return_last_state=True,
        )
        return out

    whole, last = over(0, rows, _plain_scan)
    scan = ScanFromState(modeling_mamba.mamba_selective_scan)
    first, state = over(0, cut, scan)
    scan.begin(state)
    second, end = over(cut, rows, scan)
    torch.testing.assert_close(torch.cat([first, second], -1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(end, last, atol=1e-4, rtol=1e-4)


def _plain_scan(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    **_: bool,
) -> tuple[Tensor, Tensor]:
    """h ← exp(A Δ) h + Δ B u, y = C h + D u, row by row."""
    steps = functional.softplus(dt if delta_bias is None else dt + delta_bias[:, None])
    state = torch.zeros(hidden.shape[0], *A.shape)
    rows = []
    for t in range(hidden.shape[-1]):
        step, u = steps[..., t, None], hidden[..., t, None]
        state = torch.exp(A * step) * state + step * B[:, None, :, t] * u
        rows.append((state * C[:, None, :, t]).sum(-1) + D * hidden[..., t])
    out = torch.stack(rows, -1)
    return (out if z is None else out * functional.silu(z)), state
