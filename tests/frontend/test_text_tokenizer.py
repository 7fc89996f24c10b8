"""The tokenizer's wrapper."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_support import END, START, byte_text, byte_tokenizer

from quickchange_server.errors import ContextLengthError, InvalidRequestError
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import AT_ONCE, LONG_TEXT, Text

TEXT = byte_text()
MERGED = byte_tokenizer([("a", "a"), ("aa", "aa"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ")])
WORDS = Text(model_tokenizer(MERGED), vocab_size=len(MERGED), eos_ids=frozenset({END}))


@pytest.mark.parametrize("length", [5, LONG_TEXT + 1])
def test_short_and_long_texts_encode_alike(length: int) -> None:
    text = "é" * length
    assert asyncio.run(TEXT.encode(text, most=10**6, param="prompt")) == list(text.encode())


def test_a_chat_has_its_special_tokens_once() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    ids = asyncio.run(TEXT.encode_chat(lambda: chat, 2, most=100, param="messages"))
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


def texts_of(words: list[str], most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), max_size=4 * most).map("".join)


@given(texts_of(["a", "é", "🙂", "   ", "<|im_end|>", "aaaa"], 64))
def test_no_text_that_fits_is_refused_by_its_bytes(text: str) -> None:
    most = 64
    fits = len(WORDS.encode_now(text)) <= most
    if fits:
        assert WORDS.encode_within(text, most=most, param="prompt") == WORDS.encode_now(text)
    elif len(text.encode()) > most * WORDS.longest_token:
        with pytest.raises(ContextLengthError, match="prompt: "):
            WORDS.encode_within(text, most=most, param="prompt")


@pytest.mark.parametrize("work", ["encode", "spans"])
def test_a_text_that_cannot_fit_is_never_tokenized(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = byte_text()
    seen, encode = [0], text.encode_now

    def counted(given: str, **how: bool) -> list[int]:
        seen[0] += len(given)
        return encode(given, **how)

    monkeypatch.setattr(text, "encode_now", counted)
    with pytest.raises(ContextLengthError, match="maximum context length"):
        asyncio.run(getattr(text, work)("x" * 10**7, most=100, param="prompt"))
    assert seen[0] <= 100 * 8


def test_only_so_many_long_texts_are_tokenized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text, running, most = byte_text(), [0], [0]
    encode = text.encode_now

    def slowly(given: str, **how: bool) -> list[int]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)
        running[0] -= 1
        return encode(given, **how)

    monkeypatch.setattr(text, "encode_now", slowly)

    async def all_at_once() -> None:
        long = "x" * LONG_TEXT
        await asyncio.gather(*(text.encode(long, most=10**6, param="p") for _ in range(12)))

    asyncio.run(all_at_once())
    assert most[0] == AT_ONCE
