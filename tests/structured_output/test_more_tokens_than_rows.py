"""Tokenizers with ids that the model has no row for: structured output leaves these tokens out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_support import END, byte_tokenizer, sentencepiece_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.compiler import Masked
from quickchange_server.structured_output.grammar import TokenGrammars

MERGES = [("a", "b"), ("ab", "c"), ("1", "2"), ('"', "a")]  # ids from 258 on


def allowed(text: Text, regex: str, *taken: int) -> list[int]:
    """Token ids that may follow `taken`."""
    grammars = TokenGrammars.of(text)
    matcher = grammars.compile(Constraint("regex", regex))
    for token in taken:
        matcher.advance(token)
    bits = np.zeros((1, -(-text.vocab_size // 32)), dtype=np.int32)
    grammars.fill([Masked(matcher, 0, ())], bits)
    found = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
    return [int(i) for i in found]


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(258, 268))
def test_masks_hold_exactly_the_tokens_that_the_model_has(rows: int) -> None:
    text = Text(model_tokenizer(byte_tokenizer(MERGES)), vocab_size=rows, eos_ids=frozenset({END}))
    whole = allowed(
        Text(model_tokenizer(byte_tokenizer(MERGES)), vocab_size=300, eos_ids=frozenset({END})),
        r'[ab"12]*c?',
    )
    assert allowed(text, r'[ab"12]*c?') == [token for token in whole if token < rows]


def test_a_special_token_past_the_last_row_is_left_out() -> None:
    """Gemma 3 1B: one image token more than the model has rows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == 258
    text = Text(model_tokenizer(tokenizer), vocab_size=258, eos_ids=frozenset({END, 258}))
    assert text.eos_ids == {END}
    assert allowed(text, "ab", ord("a")) == [ord("b")]
    assert allowed(text, "ab", *b"ab") == [END]


def test_forced_tokens_have_rows() -> None:
    text = Text(model_tokenizer(byte_tokenizer(MERGES)), vocab_size=259, eos_ids=frozenset({END}))
    matcher = TokenGrammars.of(text).compile(Constraint("regex", "abcabc12"))
    forced = matcher.forced()
    assert forced
    assert max(forced) < 259


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "rows", "end"), [(unigram(), 4, 1), (sentencepiece_tokenizer(True), 266, 2)]
)
def test_other_kinds_of_tokenizers_are_cut_too(
    tokenizer: PreTrainedTokenizerFast, rows: int, end: int
) -> None:
    assert len(tokenizer) > rows
    text = Text(model_tokenizer(tokenizer), vocab_size=rows, eos_ids=frozenset({end}))
    found = allowed(text, "[ab]+")
    assert found
    assert max(found) < rows
