"""`quickchange warm-cache` compiles, without a GPU, what an engine on it looks for in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_model
from transformers import AutoConfig

from quickchange_kernels.absent_gpu import absent_gpu
from quickchange_kernels.elementwise.silu_mul import silu_mul
from quickchange_kernels.gpu_targets import TARGETS
from quickchange_kernels.kernel_cache import PREBUILT, filling, link_prebuilt
from quickchange_server.entrypoints.warm_cache import warm_cache
from quickchange_server.errors import SettingError
from quickchange_server.model.loading.short_model import short_model

SMALL = {"max_sequences": 1, "max_batch_tokens": 16, "adapters": False, "turbo": False}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The configuration alone: weights are not read."""
    path = save_model("llama", tmp_path / "llama")
    (path / "model.safetensors").unlink()
    return path


def test_a_second_engine_of_the_same_settings_finds_all_that_the_first_compiled(
    llama: Path, tmp_path: Path
) -> None:
    given, cache = {"model": str(llama), **SMALL}, tmp_path / "cache"
    first = warm_cache(given, gpu="h100", out=cache)
    second = warm_cache(given, gpu="sm_90", out=cache)
    assert {"paged_attention_kernel", "kv_write_kernel", "token_kernel"} <= set(first.compiled)
    assert first.target == second.target == "sm_90"
    assert second.compiled == ()
    assert second.found == first.found + len(first.compiled)
    suffixes = {path.suffix for path in cache.rglob("*") if path.is_file()}
    assert suffixes == {".cubin", ".json", ".source"}, "stages on the way are left out"


def test_a_gpu_that_is_not_known_and_one_that_is_not_there_are_refused(llama: Path) -> None:
    with pytest.raises(SettingError, match=r"--gpu voodoo2: not known; name one of .*a100, h100"):
        warm_cache({"model": str(llama)}, gpu="voodoo2", out=None)
    with pytest.raises(SettingError, match="no GPU here; name the one to compile for"):
        warm_cache({"model": str(llama)}, gpu=None, out=None)


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 1), ("gemma2", 2), ("dots1", 2), ("gemma4", 4)]
)
def test_a_short_model_has_one_layer_of_each_kind(family: str, layers: int, tmp_path: Path) -> None:
    whole = make_model(family)
    whole.config.save_pretrained(tmp_path)
    short = short_model(AutoConfig.from_pretrained(tmp_path), torch.bfloat16)
    held = short.get_submodule("model.layers")
    assert len(list(held.children())) == layers
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    assert {name: p.shape for name, p in short.named_parameters()}.items() <= shapes.items()
    assert {p.dtype for p in short.parameters()} == {torch.bfloat16}


def test_prebuilt_entries_are_found_where_the_cache_lacks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    x = torch.ones(3, 64)
    with filling(shipped / PREBUILT) as filled, absent_gpu(TARGETS["sm_90"]):
        silu_mul(x)
    assert filled.compiled == ["silu_mul_kernel"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(own))
    monkeypatch.setenv("QUICKCHANGE_PREBUILT", str(shipped))
    assert link_prebuilt() == 1
    assert link_prebuilt() == 0
    with filling(None) as found, absent_gpu(TARGETS["sm_90"]):
        silu_mul(x)
    assert (found.folder, found.compiled, found.found) == (own, [], 1)
