"""The canonical bytes: a pure function of what the adapter computes, in plain safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_bytes import to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import (
    ACTIVATIONS,
    SOURCES,
    Activation,
    CanonicalAdapter,
    LowRankUpdate,
    Source,
)
from quickchange_store.errors import CorruptVersionError, InvalidAdapterError

PINNED = "64c376b1b73b9617a1df067bbb9df2f1bbe85209a8261367a825054b90b1e01a"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def update(rank: int, dtype: torch.dtype, bias: bool, value: float = 1.0) -> LowRankUpdate:
    a = (torch.arange(rank * 5).reshape(rank, 5) + value).to(dtype)
    b = (torch.arange(3 * rank).reshape(3, rank) - value).to(dtype)
    return LowRankUpdate(a, b, 0.5, torch.ones(3) * value if bias else None)


def bottleneck(rank: int, activation: Activation, source: Source, shift: bool) -> LowRankUpdate:
    a = torch.arange(rank * 3).reshape(rank, 3).float()
    row = torch.arange(rank).half() if shift else None
    return LowRankUpdate(a, a.T, 2.0, torch.ones(3), activation, source, row)


def gain(rank: int, dtype: torch.dtype) -> LowRankUpdate:
    return dataclasses.replace(update(rank, dtype, True), gain=torch.arange(3.0))


updates = st.one_of(
    st.builds(
        update,
        st.sampled_from([0, 1, 3, 8]),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.floats(-8, 8),
    ),
    st.builds(
        bottleneck,
        st.sampled_from([1, 8]),
        st.sampled_from(ACTIVATIONS),
        st.sampled_from(SOURCES),
        st.booleans(),
    ),
    st.builds(gain, st.sampled_from([0, 2]), st.sampled_from(DTYPES)),
)
adapters = st.builds(
    CanonicalAdapter,
    st.sampled_from(["LlamaForCausalLM", "PhiForCausalLM"]),
    st.just("base"),
    st.dictionaries(st.sampled_from(["m.q", "m.k", "lm_head", "m.a", "m"]), updates, min_size=1),
)


def same(left: LowRankUpdate, right: LowRankUpdate) -> bool:
    pairs = zip(left.tensors.values(), right.tensors.values(), strict=False)
    return (
        (left.scale, left.activation, left.source) == (right.scale, right.activation, right.source)
        and left.tensors.keys() == right.tensors.keys()
        and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    )


@settings(max_examples=40, deadline=None)
@given(adapter=adapters)
def test_what_is_written_is_read_back(
    adapter: CanonicalAdapter, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "adapter.safetensors"
    with path.open("wb") as file:
        digest = adapter_bytes.write(adapter, file)
    loaded = adapter_bytes.load(path)
    assert loaded.architecture == adapter.architecture
    assert loaded.updates.keys() == adapter.updates.keys()
    assert all(same(loaded.updates[m], adapter.updates[m]) for m in adapter.updates)
    assert path.read_bytes() == to_bytes(adapter)
    assert digest == adapter_bytes.digest(loaded) == adapter_bytes.file_digest(path)


@settings(max_examples=40, deadline=None)
@given(adapter=adapters, random=st.randoms(use_true_random=False))
def test_the_order_of_modules_does_not_matter(adapter: CanonicalAdapter, random: Any) -> None:
    modules = list(adapter.updates.items())
    random.shuffle(modules)
    shuffled = dataclasses.replace(adapter, updates=dict(modules))
    assert to_bytes(shuffled) == to_bytes(adapter)


def test_where_an_adapter_came_from_does_not_matter() -> None:
    adapter = CanonicalAdapter("L", "base", {"m": update(2, torch.float32, True)}, {"format": "x"})
    other = dataclasses.replace(adapter, base_name="another", source={"seed": 3})
    assert adapter_bytes.digest(other) == adapter_bytes.digest(adapter)


def test_memory_layout_does_not_matter() -> None:
    plain = update(2, torch.float32, False)
    strided = LowRankUpdate(plain.a.T.contiguous().T, plain.b, plain.scale)
    assert not strided.a.is_contiguous()
    bytes_of = [to_bytes(CanonicalAdapter("L", "base", {"m": u})) for u in (plain, strided)]
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda u: dataclasses.replace(u, scale=0.25),
        lambda u: dataclasses.replace(u, a=u.a + 1),
        lambda u: dataclasses.replace(u, a=u.a.bfloat16()),
        lambda u: dataclasses.replace(u, bias=None),
        lambda u: dataclasses.replace(u, activation="relu"),
        lambda u: dataclasses.replace(u, shift=torch.zeros(2)),
        lambda u: dataclasses.replace(u, gain=torch.ones(3)),
    ],
)
def test_what_changes_the_function_changes_the_digest(change: Any) -> None:
    before = CanonicalAdapter("L", "base", {"m": update(2, torch.float32, True)})
    after = dataclasses.replace(before, updates={"m": change(before.updates["m"])})
    assert adapter_bytes.digest(after) != adapter_bytes.digest(before)


def test_the_bytes_stay_the_same_over_releases() -> None:
    adapter = CanonicalAdapter(
        "L", "b", {"m": update(2, torch.bfloat16, True), "n": update(0, torch.float32, True)}
    )
    assert adapter_bytes.digest(adapter) == PINNED
    assert hashlib.sha256(to_bytes(adapter)).hexdigest() == PINNED


def test_what_an_update_reads_changes_the_digest() -> None:
    digests = {
        adapter_bytes.digest(CanonicalAdapter("L", "b", {"m": bottleneck(2, "relu", source, True)}))
        for source in SOURCES
    }
    assert len(digests) == len(SOURCES)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    content = to_bytes(CanonicalAdapter("L", "b", {"m": gain(2, torch.float32)}))
    assert content.count(b'\\"format\\":2') == 1
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content.replace(b'\\"format\\":2', b'\\"format\\":9'))
    with pytest.raises(CorruptVersionError, match="format 9"):
        adapter_bytes.load(path)


def test_an_unknown_activation_in_a_file_is_refused(tmp_path: Path) -> None:
    adapter = CanonicalAdapter("L", "b", {"m": bottleneck(2, "relu", "output", True)})
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(to_bytes(adapter).replace(b"relu", b"mish"))
    with pytest.raises(CorruptVersionError, match="mish"):
        adapter_bytes.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shift": torch.zeros(3)},
        {"gain": torch.zeros(2)},
        {"bias": torch.zeros(3, 1)},
        {"source": "output"},  # 5 inputs, 3 outputs
        {"activation": "mish"},
        {"source": "elsewhere"},
    ],
)
def test_parts_that_do_not_go_together_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapterError):
        dataclasses.replace(update(2, torch.float32, False), **change)


def test_a_gain_on_what_is_not_the_modules_own_output_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="gain"):
        dataclasses.replace(bottleneck(2, "relu", "output", False), gain=torch.ones(3))


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    adapter = CanonicalAdapter("L", "base", {"m": update(2, torch.bfloat16, True)})
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(to_bytes(adapter))
    with safe_open(str(path), framework="pt") as file:
        assert set(file.keys()) == {"m.a", "m.b", "m.bias"}
        assert torch.equal(file.get_tensor("m.a"), adapter.updates["m"].a)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_cut_file_is_refused(keep: int, tmp_path: Path) -> None:
    content = to_bytes(CanonicalAdapter("L", "b", {"m": update(2, torch.float32, True)}))
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content[:keep])
    with pytest.raises(CorruptVersionError, match=r"adapter\.safetensors"):
        adapter_bytes.load(path)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    bad = dataclasses.replace(update(2, torch.float32, False), scale=math.inf)
    with pytest.raises(InvalidAdapterError, match="m: the scale"):
        to_bytes(CanonicalAdapter("L", "base", {"m": bad}))


def test_a_dtype_that_can_not_be_stored_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match=r"m\.a"):
        adapter_bytes.digest(CanonicalAdapter("L", "base", {"m": update(2, torch.float64, False)}))


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="do not fit"):
        LowRankUpdate(torch.zeros(2, 5), torch.zeros(3, 4), 1.0)
