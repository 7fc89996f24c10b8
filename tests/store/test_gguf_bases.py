"""A base from one GGUF file: its numbers, its names, its tokenizer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import write_llama

from quickchange_store.base_model.base_source import BaseSource, base_name
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.base_model.base_weights import load_base
from quickchange_store.base_model.gguf_tokenizer import gguf_tokenizer
from quickchange_store.errors import BaseModelError

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_blocks_stand_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_llama(path, kind)
    loaded = load_base(str(path), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)


def test_the_spec_has_the_models_modules_and_reads_single_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_llama(path, "Q8_0")
    spec = base_spec(path)
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.modules["model.layers.1.self_attn.k_proj"].out_features == 128
    name = "model.layers.1.self_attn.k_proj.weight"
    assert spec.weights is not None
    torch.testing.assert_close(spec.weights.tensor(name), model.get_parameter(name).detach())


def test_rotary_frequencies_take_the_files_factors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    model = write_llama(path, "F32", extra={"rope_freqs.weight": factors})
    loaded = load_base(str(path), dtype=torch.float32)
    expected = model.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F32", extra={"blk.0.attn_q.bias": np.ones(256, np.float32)})
    with pytest.raises(BaseModelError, match=r"blk\.0\.attn_q\.bias"):
        load_base(str(path))


def test_positions_that_would_go_unscaled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F32", fields={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(BaseModelError, match=r"rope\.scaling\.type.*'yarn'"):
        load_base(str(path))


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F32", architecture="rwkv7")
    with pytest.raises(BaseModelError, match=r"rwkv7.*convert the model to safetensors"):
        base_spec(path)


def test_one_of_several_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write_llama(path, "F32", fields={"split.count": 2})
    with pytest.raises(BaseModelError, match="llama-gguf-split --merge"):
        load_base(str(path))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(part: float, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F16")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(BaseModelError, match=r"cut short: fetch the file again"):
        load_base(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"there is no file .*absent\.gguf"):
        base_spec(tmp_path / "absent.gguf")


def test_a_file_on_the_hub_is_named_behind_a_colon() -> None:
    source = BaseSource.of("owner/name:part/tiny.Q4_K.gguf")
    assert (source.where, source.gguf_file) == ("owner/name", "part/tiny.Q4_K.gguf")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("a/b/tiny.Q8_0.gguf", "tiny.Q8_0"),
        ("owner/name:tiny.gguf", "tiny"),
        ("owner/name", "owner/name"),
    ],
)
def test_a_base_is_served_under_its_files_name(model: str, name: str) -> None:
    assert base_name(model) == name


def test_digits_are_cut_as_the_file_says(tmp_path: Path) -> None:
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"])):
        path = tmp_path / f"{pre}.gguf"
        write_llama(path, "F32", pre=pre)
        tokenizer, size, ends = gguf_tokenizer(path)
        assert tokenizer("12").tokens() == expected
        assert (size, ends) == (300, frozenset({1}))
        chat = [{"role": "user", "content": "he"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>he"


def test_an_unknown_cut_needs_a_tokenizer_beside_the_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "known.gguf", "F32", pre="smollm")
    path = tmp_path / "tiny.gguf"
    write_llama(path, "F32", pre="of-tomorrow")
    with pytest.raises(BaseModelError, match=r"of-tomorrow.*put the model's tokenizer\.json"):
        gguf_tokenizer(path)
    known, *_ = gguf_tokenizer(tmp_path / "known.gguf")
    known.save_pretrained(tmp_path)
    tokenizer, *_ = gguf_tokenizer(path)
    assert tokenizer("12").tokens() == ["1", "2"]
