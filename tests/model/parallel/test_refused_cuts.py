"""What can't be cut in equal parts is refused before a weight is read, with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import write_llama
from quantized_models import KINDS
from tiny_models import save_model

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.parallel.sharding_plan import whole_ends


@pytest.mark.parametrize(
    ("family", "ranks", "said"),
    [
        ("llama", 3, r"q_proj's heads \(4\) can't be cut in 3 equal parts"),
        ("llama", 4, r"k_proj's heads of keys and values \(2\) can't be cut in 4"),
        ("qwen3_moe", 4, r"k_proj's heads of keys and values \(2\)"),
        ("phi", 3, r"\(4\) can't be cut in 3"),
        ("deepseek_v2", 8, r"heads \(4\) can't be cut in 8"),
        ("granitemoe", 32, r"experts.gate_up_proj \(160\) can't be cut in 64"),
        ("stablelm", 2, "has no plan to cut StableLmForCausalLM"),
        ("gpt2", 2, "has no plan to cut GPT2LMHeadModel"),
    ],
)
def test_models_that_do_not_divide_are_refused(
    family: str, ranks: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as refusal:
        whole_ends(str(save_model(family, tmp_path)), ranks)
    assert refusal.value.param == "tensor_parallel"
    assert "--tensor-parallel" in refusal.value.message


def test_embedding_and_head_stay_whole(tmp_path: Path) -> None:
    assert set(whole_ends(str(save_model("llama", tmp_path)), 2)) == {
        "lm_head",
        "model.embed_tokens",
    }


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "base.gguf", "F32")
    with pytest.raises(UnsupportedModelError, match="GGUF file is read whole"):
        whole_ends(str(tmp_path / "base.gguf"), 2)


def test_weights_stored_quantised_are_refused(tmp_path: Path) -> None:
    KINDS["fp8-blocks"](tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match="stored quantised"):
        whole_ends(str(tmp_path), 2)
