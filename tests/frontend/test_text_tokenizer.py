"""The tokenizer's wrapper."""

from __future__ import annotations

import asyncio

import pytest
from text_support import END, START, byte_text

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.tokenizer import LONG_TEXT

TEXT = byte_text()


@pytest.mark.parametrize("length", [5, LONG_TEXT + 1])
def test_short_and_long_texts_encode_alike(length: int) -> None:
    text = "é" * length
    assert asyncio.run(TEXT.encode(text)) == list(text.encode())


def test_a_chat_has_its_special_tokens_once() -> None:
    ids = asyncio.run(TEXT.encode_chat([{"role": "user", "content": "Hi"}]))
    assert ids == [START, *b"user\nHi", END, *b"\n", START, *b"assistant\n"]


def test_decode_is_the_inverse_of_encode() -> None:
    assert TEXT.decode(TEXT.encode_now("né 🙂<|im_end|>")) == "né 🙂<|im_end|>"


@pytest.mark.parametrize("wrong", [-1, 258])
def test_ids_out_of_the_vocabulary_are_named(wrong: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"token id {wrong} .* 0 to 257"):
        TEXT.check_ids([1, wrong], "prompt")


def test_a_template_error_names_the_messages() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequestError, match="system comes first") as caught:
        TEXT.render_chat(messages)
    assert caught.value.param == "messages"
