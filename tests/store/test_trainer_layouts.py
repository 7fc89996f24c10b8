"""What trainers write is the adapter that PEFT's own folder is, or is refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_layouts import (
    REFUSED,
    SERVED,
    TrainerLayout,
    write_peft,
)

from quickchange_store.canonical.canonical_adapter import digest
from quickchange_store.errors import StoreError
from quickchange_store.importing import read_adapter


def name(layout: TrainerLayout) -> str:
    return f"{layout.trainer}: {layout.writes}"


@pytest.fixture(scope="module")
def plain(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    write_peft(folder)
    return digest(read_adapter(folder, bases("llama").spec).adapter)


@pytest.mark.parametrize("layout", SERVED, ids=name)
def test_a_trainers_folder_is_the_adapter_that_pefts_is(
    layout: TrainerLayout, plain: str, bases: Any, tmp_path: Path
) -> None:
    layout.write(tmp_path)
    assert digest(read_adapter(tmp_path, bases("llama").spec).adapter) == plain


@pytest.mark.parametrize("layout", REFUSED, ids=name)
def test_what_is_no_adapter_yet_is_refused_with_what_makes_it_one(
    layout: TrainerLayout, bases: Any, tmp_path: Path
) -> None:
    layout.write(tmp_path)
    with pytest.raises(StoreError) as caught:
        read_adapter(tmp_path, bases("llama").spec)
    assert caught.value.file
    assert layout.refused is not None
    assert layout.refused in str(caught.value.remedy)
