"""A GGUF file as `--model`: its tokens, with an adapter, rounded, and behind HTTP's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from gguf_models import write_llama
from peft import LoraConfig, get_peft_model
from tiny_models import greedy

from quickchange_kernels.linear.linear_int8 import dequantize_int8, quantize_int8
from quickchange_server.errors import SettingError
from quickchange_server.frontend.tokenizer import Text
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.formats.peft.lora import read_peft

PROMPTS = {"a": [7, 9, 200, 4, 11, 5, 31], "b": [17, 3]}


def test_base_and_adapter_give_pefts_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_llama(path, "Q6_K")
    expected = {"a": greedy(model, PROMPTS["a"], 10)}
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    expected["b"] = greedy(tuned, PROMPTS["b"], 10)
    tuned.save_pretrained(tmp_path / "lora")
    adapter = read_peft(tmp_path / "lora", base_spec(path)).adapter
    engine = make_engine(path, load=lambda _: adapter, store=tmp_path)
    driver = Driver(engine)
    engine.submit(request("a", PROMPTS["a"]))
    engine.submit(request("b", PROMPTS["b"], [("lora", 1.0)]))
    driver.finish("a", "b")
    assert driver.tokens == expected


def test_weights_may_be_kept_as_int8(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    rounded = write_llama(path, "Q4_K")
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            quantized = quantize_int8(module.weight.detach())
            module.weight = torch.nn.Parameter(dequantize_int8(*quantized, torch.float32))
    engine = make_engine(path, quantization="int8", store=tmp_path)
    driver = Driver(engine)
    engine.submit(request("a", PROMPTS["a"]))
    driver.finish("a")
    assert driver.tokens["a"] == greedy(rounded, PROMPTS["a"], 10)


def test_text_is_read_with_the_files_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F16")
    text = Text.load(str(path))
    assert text.vocab_size == 300
    assert text.eos_ids == frozenset({1})
    assert text.template.exists
    assert text.decode(text.encode_now("hello 12")) == "hello 12"


@pytest.mark.parametrize("name", ["absent.gguf", "./absent.gguf"])
def test_a_missing_file_is_refused_as_the_setting(name: str) -> None:
    with pytest.raises(SettingError, match=r"no file .*absent\.gguf") as error:
        Text.load(name)
    assert error.value.param == "model"
