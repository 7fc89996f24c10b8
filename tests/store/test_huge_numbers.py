"""Numbers that no request could be served with are refused when an adapter is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_store.canonical.adapter_bytes import LARGEST, digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import InvalidAdapterError
from quickchange_store.store import Store

PATH = "model.layers.0.mlp.down_proj"


def update(**parts: torch.Tensor) -> LowRankUpdate:
    given = {"a": torch.ones(2, 6), "b": torch.ones(6, 2), **parts}
    return LowRankUpdate(scale=0.5, activation="gelu", **given)  # type: ignore[arg-type]


def of(one: LowRankUpdate) -> CanonicalAdapter:
    return CanonicalAdapter("L", "tiny", {PATH: one})


PARTS = {"a": (2, 6), "b": (6, 2), "bias": (6,), "shift": (2,), "gain": (6,)}
too_large = st.floats(LARGEST * 1.01, 3e38) | st.sampled_from([math.inf, math.nan])


@settings(deadline=None)
@given(part=st.sampled_from(sorted(PARTS)), value=too_large, negative=st.booleans())
def test_a_number_beyond_the_largest_names_its_tensor(
    part: str, value: float, negative: bool
) -> None:
    tensor = torch.ones(PARTS[part])
    tensor.view(-1)[1] = -value if negative else value
    with pytest.raises(InvalidAdapterError) as error:
        digest(of(update(**{part: tensor})))
    assert error.value.key == f"{PATH}.{part}"


@settings(deadline=None)
@given(scale=st.floats(LARGEST * 1.01) | st.just(math.nan) | st.floats(max_value=-LARGEST * 1.01))
def test_a_scale_beyond_the_largest_names_lora_alpha(scale: float) -> None:
    with pytest.raises(InvalidAdapterError, match="lora_alpha"):
        digest(of(replace(update(), scale=scale)))


def test_factors_whose_product_overflows_are_refused_together() -> None:
    with pytest.raises(
        InvalidAdapterError, match=r"scale · B · A may multiply its input by 3e\+14"
    ):
        digest(
            of(replace(update(a=torch.full((2, 6), 1e7), b=torch.full((6, 2), 1e7)), scale=0.25))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_that_can_be_served_are_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    store = Store(tmp_path)
    large = update(a=torch.full((2, 6), 3e4, dtype=dtype), b=torch.full((6, 2), 3e4, dtype=dtype))
    assert store.add("large", of(replace(large, scale=1.0)))


@pytest.mark.parametrize("name", ["turbo.block.0.weight", "turbo.block.1.bias", "turbo.output.0"])
def test_turbo_heads_are_held_to_it_too(name: str) -> None:
    heads = make_turbo(6, 2, own_outputs=5)
    parts: dict[str, Callable[[], torch.Tensor]] = {
        "turbo.block.0.weight": lambda: heads.blocks[0].weight,
        "turbo.block.1.bias": lambda: heads.blocks[1].bias,
        "turbo.output.0": lambda: heads.outputs[0],
    }
    parts[name]().view(-1)[2] = 1e30
    with pytest.raises(InvalidAdapterError) as error:
        digest(turbo_adapter(heads))
    assert error.value.key == name


def test_a_store_that_refuses_one_is_as_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("mine", of(update()))
    with pytest.raises(InvalidAdapterError, match=rf"{PATH}\.b"):
        store.add("mine", of(update(b=torch.full((6, 2), 1e30))))
    assert [version.number for version in store.versions("mine")] == [1]
    assert store.verify() == []
