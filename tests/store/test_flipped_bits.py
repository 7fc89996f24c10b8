"""A stored version with a flipped bit in any of its files is noticed before it is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import CorruptVersionError
from quickchange_store.store import ADAPTER_FILE, INFO_FILE, Store


def adapter() -> CanonicalAdapter:
    """One with every part that a version may have."""
    update = LowRankUpdate(
        torch.eye(2, 4),
        torch.ones(4, 2),
        scale=0.5,
        bias=torch.ones(4),
        activation="gelu",
        shift=torch.ones(2),
        gain=torch.full((4,), 2.0),
    )
    heads = make_turbo(4, 2, vocabulary=[1, 5, 6], own_outputs=3)
    return turbo_adapter(heads, model__layers__0__q_proj=update)


@pytest.fixture
def version(tmp_path: Path) -> tuple[Store, str, Path]:
    store = Store(tmp_path)
    made = store.add("mine", adapter()).digest
    return store, made, store.path(made).parent


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    version: tuple[Store, str, Path], data: st.DataObject
) -> None:
    store, made, folder = version
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(good) == [ADAPTER_FILE, INFO_FILE]
    before, info = store.load(made), store.info(made)
    file = folder / data.draw(st.sampled_from(sorted(good)))
    content = bytearray(good[file.name])
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    try:
        loaded, found = store.load(made), store.info(made)
    except CorruptVersionError as error:
        assert "add the adapter again" in str(error)  # noqa: PT017
        assert len(store.verify()) == 1
        return
    finally:
        file.write_bytes(good[file.name])
    assert file.name == INFO_FILE
    assert (digest(loaded), loaded.source, found) == (digest(before), before.source, info)


def test_every_bit_of_a_versions_figures_is_noticed(version: tuple[Store, str, Path]) -> None:
    store, made, folder = version
    file = folder / INFO_FILE
    good, info = file.read_bytes(), store.info(made)
    for bit in range(8 * len(good)):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            assert store.info(made) == info
        except CorruptVersionError:
            continue


def test_figures_of_earlier_releases_without_a_checksum_are_read(
    version: tuple[Store, str, Path],
) -> None:
    store, made, folder = version
    file, info = folder / INFO_FILE, store.info(made)
    lines = [line for line in file.read_text().splitlines() if '"checksum"' not in line]
    file.write_text("\n".join(lines))
    assert store.info(made) == info


def test_the_same_content_repairs_the_version(version: tuple[Store, str, Path]) -> None:
    store, made, folder = version
    file = folder / ADAPTER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptVersionError, match=r"damaged.*add the adapter again.*verify"):
        store.load(made)
    store.add("mine", adapter())
    assert digest(store.load(made)) == made
