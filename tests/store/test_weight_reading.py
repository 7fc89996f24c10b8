"""Pages of weight files are given back, values stay; how far reading is, is said."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quickchange_store.base_model import weight_reading
from quickchange_store.base_model.base_weights import load_base
from quickchange_store.base_model.weight_reading import reading, release, release_files

MEGABYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped_file_bytes() -> int:
    """Memory of this process that holds pages of weight files."""
    text = Path("/proc/self/smaps").read_text()
    areas = re.findall(r"\.safetensors\n.*?\nRss:\s+(\d+) kB", text, re.DOTALL)
    return sum(int(each) * 1024 for each in areas)


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    made = {name: torch.full((4 * MEGABYTE,), float(i)) for i, name in enumerate("abc", 1)}
    save_file(made, tmp_path / "w.safetensors")
    return load_file(tmp_path / "w.safetensors")


@linux
def test_a_copied_tensors_pages_are_given_back_and_can_be_read_again(
    weights: dict[str, torch.Tensor],
) -> None:
    sums = {name: float(tensor.mean()) for name, tensor in weights.items()}
    before = mapped_file_bytes()
    assert before > 40 * MEGABYTE
    release(weights["b"])
    assert before - mapped_file_bytes() == pytest.approx(16 * MEGABYTE, rel=0.02)
    assert {name: float(tensor.mean()) for name, tensor in weights.items()} == sums


@linux
def test_all_files_pages_are_given_back(weights: dict[str, torch.Tensor]) -> None:
    assert weights["a"].mean() == 1
    release_files()
    assert mapped_file_bytes() < MEGABYTE
    assert weights["c"].mean() == 3


def test_memory_that_is_no_file_keeps_what_was_written() -> None:
    written = torch.full((MEGABYTE,), 7.0)
    release(written)
    assert bool((written == 7).all())


def test_a_log_says_how_far_reading_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_reading, "_SAID_EVERY", 0.0)
    path = save_model("llama", tmp_path / "my-model")
    with caplog.at_level(logging.INFO, weight_reading.__name__):
        load_base(str(path), dtype=torch.bfloat16)
    lines = [record.message for record in caplog.records if record.name == weight_reading.__name__]
    assert re.fullmatch(r"loading my-model: 100% after \d+ s", lines[-1])


def test_a_terminal_gets_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model("llama", tmp_path / "my-model")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_base(str(path))
    assert re.search(r"loading my-model: 100%", capsys.readouterr().err)


def test_transformers_bars_are_its_own_again_afterwards() -> None:
    from transformers.utils import logging as transformers_logging

    with reading("loading", cast=False):
        pass
    assert transformers_logging.set_tqdm_hook(None) is None
