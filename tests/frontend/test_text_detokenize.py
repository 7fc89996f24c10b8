"""Incremental detokenising against the tokenizers library's own decoding."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_support import byte_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer

from quickchange_server.frontend.detokenizer import Decoding
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer

MERGES = [("Ã", "©"), ("a", "b"), ("Ġ", "a"), ("ð", "Ł")]  # é, ab, " a", the first half of an emoji
TOKENIZERS = {
    "byte_level": byte_tokenizer(MERGES),
    "sentencepiece": sentencepiece_tokenizer(strip=False),
    "sentencepiece_strip": sentencepiece_tokenizer(strip=True),
    "window": metaspace_tokenizer(),
}
DECODINGS = {name: Decoding(model_tokenizer(tokenizer)) for name, tokenizer in TOKENIZERS.items()}


def pieces_of(decoding: Decoding, ids: list[int], skip: bool) -> list[str]:
    detokenizer = decoding.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def library_decode(tokenizer: Any, ids: list[int], skip: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_pieces_join_to_the_librarys_decoding(
    name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer, decoding = TOKENIZERS[name], DECODINGS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=24))
    assert "".join(pieces_of(decoding, ids, skip)) == library_decode(tokenizer, ids, skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), skip=st.booleans())
def test_no_piece_of_valid_text_holds_half_a_character(text: str, skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(text)
    pieces = pieces_of(DECODINGS["byte_level"], ids, skip)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = list("né🙂".encode())
    pieces = pieces_of(DECODINGS["byte_level"], ids, True)
    assert pieces == ["n", "", "é", "", "", "", "🙂", ""]


def test_a_cut_off_character_becomes_a_replacement_at_the_end() -> None:
    assert pieces_of(DECODINGS["byte_level"], [0xF0, 0x9F], True) == ["", "", "\ufffd"]


def test_special_tokens_are_skipped_or_written() -> None:
    decoding = DECODINGS["byte_level"]
    ids = [97, 257]
    assert "".join(pieces_of(decoding, ids, True)) == "a"
    assert "".join(pieces_of(decoding, ids, False)) == "a<|im_end|>"


def test_the_first_space_is_stripped_once() -> None:
    tokenizer = TOKENIZERS["sentencepiece_strip"]
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert pieces_of(DECODINGS["sentencepiece_strip"], [the, the], True) == ["the", " the", ""]


def test_token_bytes_join_to_the_text() -> None:
    text = " é🙂ab"
    tokenizer = TOKENIZERS["byte_level"]
    joined = b"".join(map(DECODINGS["byte_level"].token_bytes, tokenizer.encode(text)))
    assert joined.decode() == text


@pytest.mark.parametrize("name", ["sentencepiece", "window"])
def test_every_strategy_gives_a_token_its_own_bytes(name: str) -> None:
    token = TOKENIZERS[name].convert_tokens_to_ids("b")
    assert DECODINGS[name].token_bytes(token) == b"b"
