"""Training data: what is read, what is refused and by which words, and how it is batched."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quickchange_training.errors import DataError
from quickchange_training.examples import (
    IGNORED,
    Encoded,
    Example,
    as_chat,
    batches,
    collate,
    encode,
    read_examples,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<eos>", "<system>", "<user>", "<assistant>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, a chat template with a token a role."""
    characters = {chr(c): c - 32 + len(SPECIAL) for c in range(32, 127)}
    vocab = {token: i for i, token in enumerate(SPECIAL)} | characters
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "train.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


GOOD = {"prompt": "a", "completion": "b"}


def test_both_kinds_of_example_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    first, second = read_examples(written(tmp_path, GOOD, "", chat))
    assert (first.prompt, first.completion) == ("a", "b")
    assert (second.prompt, second.completion) == (({"role": "user", "content": "q"},), "r")
    assert second.origin.endswith("train.jsonl line 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"not JSON: .* at column 2"),
        ("[1]", "a JSON object is expected, not list"),
        ({"prompt": "a"}, r"has the fields \['prompt'\]"),
        ({**GOOD, "extra": 1}, "has the fields"),
        ({"prompt": "a", "completion": ""}, 'field "completion" must be text that is not empty'),
        ({"prompt": 5, "completion": "b"}, 'field "prompt" must be text'),
        ({"messages": []}, 'field "messages" must be a list of two or more'),
        ({"messages": ["x", "y"]}, r'field "messages\[0\]" must be an object'),
        (
            {"messages": [{"role": "robot", "content": "x"}, {"role": "user", "content": "x"}]},
            r'field "messages\[0\].role" must be one of system, user, assistant',
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
            r'field "messages\[1\].content" must be text',
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
            "last message's role is user; it must be assistant",
        ),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_field(
    tmp_path: Path, line: Any, message: str
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl line 2: .*" + message):
        read_examples(written(tmp_path, GOOD, line))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl")


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no examples"):
        read_examples(written(tmp_path, ""))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 12"):
        read_examples(file)


def test_a_chat_is_encoded_as_the_server_sees_it_and_ends_with_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (encoded,) = encode(as_chat([Example("hi", "yo", "here")]), tokenizer, max_length=99)
    text = tokenizer.decode(list(encoded.tokens)).replace(" ", "")
    assert text == "<user>hi<eos><assistant>yo<eos>"
    assert encoded.answer_length == len("yo") + 1


def test_a_plain_prompt_is_encoded_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    (encoded,) = encode([Example("hi", "yo", "here")], tokenizer, max_length=99)
    assert encoded.prompt_length == 2


def test_too_long_an_example_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"f line 7: 5 tokens, more than 4; .*--max-length"):
        encode([Example("hi", "yo", "f line 7")], tokenizer, max_length=4)


def test_labels_are_the_answers_tokens_one_position_early() -> None:
    group = [Encoded((5, 6, 7, 8), prompt_length=3), Encoded((1, 2, 3), prompt_length=2)]
    batch = collate(group, pad_id=0)
    assert batch.first == 1
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [1, 2, 3, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED, 8, IGNORED], [3, IGNORED, IGNORED]]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=200),
    size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_each_example_once_in_batches_of_at_most_the_size(
    lengths: list[int], size: int, seed: int
) -> None:
    encoded = [Encoded((i,) * n, 1) for i, n in enumerate(lengths)]
    epoch = batches(encoded, size, random.Random(seed))
    assert sorted(e.tokens for group in epoch for e in group) == sorted(e.tokens for e in encoded)
    assert all(1 <= len(group) <= size for group in epoch)
