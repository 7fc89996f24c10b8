"""The floats that a base is served in, with `dtype` left at auto and given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, engine_of, request
from tiny_models import make_model
from transformers import AutoConfig, LlamaConfig

from quickchange_kernels import native
from quickchange_server.config import Settings
from quickchange_server.errors import SettingError
from quickchange_server.model.loading import model_dtype as chosen
from quickchange_server.model.loading.model_loader import load_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, None)


@pytest.mark.parametrize(
    ("device", "bfloat16", "expected"),
    [  # for checkpoints in FLOATS
        ("cpu", False, ["float32", "float32", "float32", "float32"]),
        ("cpu", True, ["float32", "bfloat16", "float32", "float32"]),
        ("cuda", True, ["bfloat16", "bfloat16", "float16", "bfloat16"]),
        ("cuda", False, ["float16", "float16", "float16", "float16"]),
    ],
)
def test_auto_suits_the_checkpoint_and_the_device(
    device: str, bfloat16: bool, expected: list[str]
) -> None:
    found = [chosen.suitable_dtype(each, device, bfloat16=bfloat16) for each in FLOATS]
    assert [chosen.dtype_name(each) for each in found] == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_given_dtype_is_taken_whatever_the_checkpoint_has(name: str) -> None:
    for stored in ("float32", "bfloat16", "float16"):
        config = LlamaConfig(dtype=stored)
        assert chosen.dtype_name(chosen.model_dtype(name, config, CPU)) == name


def test_a_gpu_without_bfloat16_refuses_it_by_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(SettingError, match=r"--dtype bfloat16.*Tesla T4.*float16") as caught:
        chosen.model_dtype("bfloat16", LlamaConfig(), CUDA)
    assert caught.value.param == "dtype"
    assert chosen.model_dtype("auto", LlamaConfig(dtype="bfloat16"), CUDA) == torch.float16


def test_the_dtype_of_a_checkpoint_that_also_sees_is_its_own_or_its_texts() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"dtype": "bfloat16"})
    assert chosen.stored_dtype(config) == torch.bfloat16
    config.dtype = torch.float16
    assert chosen.stored_dtype(config) == torch.float16


def test_a_cpu_multiplies_bfloat16_only_with_the_native_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for loaded in (True, False):
        monkeypatch.setattr(native, "ensure", lambda loaded=loaded: loaded)
        assert chosen.multiplies_bfloat16(CPU) is loaded
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not chosen.multiplies_bfloat16(CPU)


def test_tests_compute_in_float32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(model="m", store=Path("s")).dtype == "float32"
    assert Settings.model_validate({"model": "m", "store": "s"}).dtype == "float32"
    monkeypatch.delenv("QUICKCHANGE_DTYPE")
    assert Settings(model="m", store=Path("s")).dtype == "auto"


def test_an_engine_serves_and_tells_the_dtype_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "multiplies_bfloat16", lambda _: True)
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="auto", device=CPU, adapters=True)
    engine = engine_of(loaded, tmp_path)
    engine.submit(request("one", [1, 2, 3], max_tokens=3))
    Driver(engine).finish("one")
    ready = engine.ready(0.0)
    engine.close()
    assert (ready.dtype, ready.adapter_dtype) == ("bfloat16", "bfloat16")
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
