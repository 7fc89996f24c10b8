"""Texts cut to a number of tokens: what transformers' truncation keeps, between special tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_models import END, PIECES, piece_tokenizer
from tokenizers.processors import TemplateProcessing

from quickchange_server.api.pooling.prompt_cut import (
    Truncation,
    TruncationSide,
    first_tokens,
    text_ids,
    truncation,
)
from quickchange_server.errors import ContextLengthError, InvalidRequestError
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text

MOST = 64


def text_of(template: str) -> tuple[Text, Any]:
    """A tokenizer with special tokens where the template has E."""
    tokenizer = piece_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template.replace("E", "<end>"),
        pair="$A $B",
        special_tokens=[("<end>", END)],
    )
    return Text(
        model_tokenizer(tokenizer), vocab_size=len(PIECES), eos_ids=frozenset({END})
    ), tokenizer


def cut(text: Text, given: Sequence[str], keep: int | None, side: TruncationSide) -> Any:
    return asyncio.run(
        text_ids(text, given, Truncation(keep, side), most=MOST, param="input", special=True)
    )


TEXTS = {template: text_of(template) for template in ("$A", "E $A", "E $A E", "$A E")}


@pytest.mark.parametrize("template", TEXTS)
@given(
    text=st.text(st.sampled_from(PIECES[:95]), min_size=1, max_size=300),
    keep=st.integers(3, MOST),
    side=st.sampled_from(["left", "right"]),
)
def test_a_cut_is_the_one_of_transformers(
    template: str, text: str, keep: int, side: TruncationSide
) -> None:
    known, tokenizer = TEXTS[template]
    tokenizer.truncation_side = side
    expected = tokenizer(text, truncation=True, max_length=keep)["input_ids"]
    tokenizer._tokenizer.no_truncation()
    assert cut(known, [text], keep, side) == [expected]


def test_without_a_limit_nothing_is_cut_and_long_texts_are_refused() -> None:
    known, _ = TEXTS["E $A"]
    assert len(cut(known, ["a" * 63], None, "right")[0]) == 64
    with pytest.raises(ContextLengthError):
        cut(known, ["a" * 10_000], None, "right")


@pytest.mark.parametrize(("side", "kept"), [("right", "ab"), ("left", "yz")])
def test_a_very_long_text_is_cut_without_being_read_whole(side: TruncationSide, kept: str) -> None:
    known, _ = TEXTS["$A"]
    [ids] = cut(known, ["ab" + "-" * 5_000_000 + "yz"], 2, side)
    assert "".join(PIECES[i] for i in ids) == kept


def test_limits_that_leave_nothing_or_pass_the_context_are_refused_by_name() -> None:
    assert truncation(-1, None, 64) == Truncation(64, "right")
    assert truncation(None, "left", 64) == Truncation(None, "left")
    for wrong in (0, 65, 2**70):
        with pytest.raises(InvalidRequestError) as caught:
            truncation(wrong, None, 64)
        assert caught.value.param == "truncate_prompt_tokens"


@given(text=st.text(st.sampled_from(PIECES[:95]), max_size=80), count=st.integers(1, 90))
def test_the_first_tokens_of_a_text_are_its_beginning(text: str, count: int) -> None:
    known, _ = TEXTS["E $A E"]
    found = asyncio.run(first_tokens(known, text, count, most=MOST, param="documents"))
    assert found == text[:count]
