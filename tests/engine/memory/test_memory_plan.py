"""What is planned of a model without its weights is what an engine with them allocates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from engine_driver import engine_of
from gguf_models import write_llama
from recurrent_models import save_recurrent
from safetensors.torch import save_file
from tiny_models import save_model

from quickchange_server.config import GIB, Settings
from quickchange_server.engine.memory.footprint import adapter_pages, pages_bytes, tensor_bytes
from quickchange_server.engine.memory.planning import memory_plan
from quickchange_server.entrypoints.gpu_names import GPUS
from quickchange_server.entrypoints.plan_command import device_bytes, planned
from quickchange_server.errors import SettingError, UnsupportedModelError
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.model.loading.model_outline import Outline, outline
from quickchange_server.model.paged_attention import PagedAttention

CPU = torch.device("cpu")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
SMOLLM = {
    **LLAMA_8B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def of(path: Path, dtype: str = "float32", quantization: str = "none") -> Outline:
    return outline(
        str(path),
        dtype=dtype,
        device="cpu",
        bfloat16=False,
        adapters=True,
        quantization=quantization,  # type: ignore[arg-type]
    )


def loaded(path: Path, dtype: str = "float32", quantization: str = "none") -> LoadedModel:
    return load_model(
        str(path),
        dtype=dtype,
        device=CPU,
        adapters=True,
        quantization=quantization,  # type: ignore[arg-type]
        model_check=False,
    )


def config_only(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def caches_of(model: LoadedModel) -> int:
    """Bytes of the installed caches of keys and values."""
    attend = next(
        each.quickchange_attend  # type: ignore[union-attr]
        for each in model.module.modules()
        if isinstance(getattr(each, "quickchange_attend", None), PagedAttention)
    )
    assert isinstance(attend, PagedAttention)
    return sum(t.nbytes for pair in attend._caches.values() for t in pair)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "gpt_oss", "gemma3n"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_outline_has_the_shapes_groups_and_bytes_of_the_loaded_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    path = save_model(family, tmp_path)
    check_same(of(path, dtype).model, loaded(path, dtype))


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba", "mamba2", "lfm2"])
def test_an_outline_has_the_states_of_recurrent_layers(kind: str, tmp_path: Path) -> None:
    path = save_recurrent(kind, tmp_path)
    check_same(of(path).model, loaded(path))


@pytest.mark.parametrize("kept", ["int8", "int8-exact", "int4"])
def test_an_outline_of_a_narrow_base_has_its_bytes(kept: str, tmp_path: Path) -> None:
    path = save_model("llama-tied", tmp_path)
    check_same(of(path, quantization=kept).model, loaded(path, quantization=kept))


def test_a_gguf_base_is_outlined_as_the_floats_that_it_becomes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_llama(file, "Q8_0")
    check_same(of(file).model, loaded(file))


def check_same(planned_model: LoadedModel, real: LoadedModel) -> None:
    for name in ("layers", "groups", "vocabulary", "hidden", "max_positions", "dtype"):
        assert getattr(planned_model, name) == getattr(real, name), name
    assert [r.shapes for r in planned_model.recurrent] == [r.shapes for r in real.recurrent]
    assert tensor_bytes(planned_model.module) == tensor_bytes(real.module)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_plan_says_what_an_engine_on_a_cpu_allocates(family: str, tmp_path: Path) -> None:
    path = save_model(family, tmp_path)
    settings = Settings(
        model=str(path), store=path, kv_cache_bytes=3 << 20, adapter_device_bytes=5 << 20
    )
    plan = memory_plan(of(path), settings, None, [16], 1 << 30)
    model = loaded(path)
    engine = engine_of(model, settings)
    pool = engine._adapters._pool  # type: ignore[union-attr]
    assert plan.base == tensor_bytes(model.module)
    assert plan.arena == pool.tables.arena.nbytes
    assert plan.caches.blocks.num_blocks == engine.scheduler.blocks.num_blocks
    assert plan.caches.blocks.num_blocks * plan.caches.block_bytes == caches_of(model)
    assert plan.caches.max_model_len == engine.ready(0.0).max_model_len
    room, pages = pool.sizes, adapter_pages(model, pool.dtype)
    assert f"room for {room.room_for(pages)} all-linear rank-16" in plan.text
    tables = [pool.tables.directory, pool.tables.pages, pool.tables.page_scale]
    tables += [pool.tables.page_shift, pool.tables.page_kind, pool.heads.pages, pool.heads.matrices]
    assert sum(table.nbytes for table in tables) <= room.table_bytes
    engine.close()


def test_llama_8b_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    model = of(config_only(tmp_path, LLAMA_8B), "auto")
    assert model.model.dtype == torch.float32  # of a CPU that does not multiply bfloat16
    model = of(tmp_path, "bfloat16")
    frequencies = 64 * 4 * 2
    assert tensor_bytes(model.model.module) == 2 * 8_030_261_248 + frequencies
    pages = adapter_pages(model.model, torch.bfloat16)
    assert pages_bytes(pages, torch.bfloat16) == 2 * 16 * 32 * (
        2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    )


@pytest.mark.parametrize("gpu", ["h100", "rtx4090", "24GiB"])
def test_a_plan_for_a_gpu_fills_its_share_and_no_more(gpu: str, tmp_path: Path) -> None:
    path = config_only(tmp_path, SMOLLM)
    settings = Settings(model=str(path), store=path, device="cuda", dtype="bfloat16")
    total = device_bytes(gpu)
    plan = memory_plan(of(path, "bfloat16"), settings, total, [8, 64], 1 << 40)
    block = plan.caches.block_bytes
    keys = plan.caches.blocks.num_blocks * block
    assert 0 < keys < 0.9 * total
    sum_line = next(line for line in plan.text.splitlines() if line.startswith("  sum"))
    assert f"of {0.9 * total / GIB:.2f} GiB: 90%" in sum_line
    room = re.search(r"room for (\d+) all-linear rank-16", plan.text)
    assert room is not None
    assert 64 <= int(room[1]) < 72


def test_a_card_that_is_too_small_is_refused_with_what_fits(tmp_path: Path) -> None:
    config_only(tmp_path, LLAMA_8B)
    given = {"model": str(tmp_path), "store": tmp_path, "dtype": "bfloat16"}
    with pytest.raises(SettingError, match=r"gpu_memory_utilization \(0\.9\).*What would fit"):
        planned(given, gpu="16GiB", ranks=None)
    with pytest.raises(SettingError, match=r"max_model_len|one sequence of 131072 tokens"):
        planned({**given, "max_model_len": 131072}, gpu="l4", ranks=None)


def test_a_quantised_checkpoint_takes_what_its_files_hold(tmp_path: Path) -> None:
    config = {**SMOLLM, "quantization_config": {"quant_method": "awq", "bits": 4}}
    config_only(tmp_path, config)
    save_file({"a": torch.zeros(1000, dtype=torch.int32)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(7, 3, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert of(tmp_path).stored_bytes == 4000 + 42
    text = planned({"model": str(tmp_path), "store": tmp_path}, gpu="l4", ranks="4,8")
    assert "as stored by awq" in text


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    config_only(tmp_path, {**SMOLLM, "quantization_config": {"quant_method": "awq", "bits": 4}})
    (tmp_path / "one.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UnsupportedModelError, match=r"one\.safetensors"):
        of(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("1.5 TiB", 3 << 39),
        ("H100", int(GPUS["h100"].gib * GIB)),
        ("80g", 80 * 10**9),
    ],
)
def test_a_device_is_named_or_given_by_its_size(name: str, expected: int) -> None:
    assert device_bytes(name) == expected


@pytest.mark.parametrize("name", ["h9000", "", "-4GiB", "12", "0GiB"])
def test_an_unknown_device_is_refused_with_those_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"such as 24GiB, or one of l4, .*rtx4090"):
        device_bytes(name)


@pytest.mark.parametrize("ranks", ["", "8,x", "0", "-8"])
def test_ranks_that_are_no_numbers_are_refused(ranks: str, tmp_path: Path) -> None:
    config_only(tmp_path, SMOLLM)
    with pytest.raises(ValueError, match="--ranks"):
        planned({"model": str(tmp_path), "store": tmp_path}, gpu=None, ranks=ranks)
