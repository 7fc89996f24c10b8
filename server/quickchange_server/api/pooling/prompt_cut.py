"""Prompts as token ids, cut to a length where the client asks for it.

A text is cut between its tokenizer's special tokens, which stay, as transformers does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from quickchange_server.api.openai.requests import Truncation, TruncationSide
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.tokenizer import LONG_TEXT, USUAL_LENGTH, Text

T = TypeVar("T")


def truncation(asked: int | None, side: TruncationSide | None, context: int) -> Truncation:
    """The truncation for vLLM's `truncate_prompt_tokens`; -1 keeps what fits the context.

    Raises InvalidRequestError.
    """
    name = "truncate_prompt_tokens"
    if asked == 0:
        raise InvalidRequestError(f"{name}: 0 leaves nothing; give 1 or more", param=name)
    if asked is not None and asked > context:
        raise InvalidRequestError(
            f"{name}: {asked} is greater than max_model_len, the context's {context} tokens. "
            "Please request a smaller truncation size.",
            param=name,
        )
    return Truncation(context if asked == -1 else asked, side or "right")


async def text_ids(
    text: Text, texts: Sequence[str], cut: Truncation, *, most: int, param: str, special: bool
) -> list[Sequence[int]]:
    """Token ids of each text. Raises ContextLengthError for one that is too long to be read."""
    if cut.keep is None:
        return list(await text.encode_each(texts, most, param, special=special))
    work = partial(_cut_ids, text, cut=cut, most=CONTEXTS * most, param=param, special=special)
    return [await apart(len(one), partial(work, one)) for one in texts]


async def apart(length: int, work: Callable[[], T]) -> T:
    """What `work` gives for a text of this length, on a thread where that takes long."""
    return work() if length < LONG_TEXT else await asyncio.to_thread(work)


def _cut_ids(
    text: Text, given: str, *, cut: Truncation, most: int, param: str, special: bool
) -> Sequence[int]:
    before, behind = _special_ids(text) if special else ([], [])
    assert cut.keep is not None
    room = cut.keep - len(before) - len(behind)
    if room < 1:
        return cut.of([*before, *behind])
    inner = Truncation(room, cut.side)
    return [*before, *inner.of(_enough(text, given, inner, most, param)), *behind]


def _enough(text: Text, given: str, cut: Truncation, most: int, param: str) -> Sequence[int]:
    """Ids of the text, or of so much of it as surely holds those that are kept."""
    assert cut.keep is not None
    window = (cut.keep + text.longest_token) * USUAL_LENGTH
    if len(given) > window:
        part = given[:window] if cut.side == "right" else given[-window:]
        ids = text.encode_now(part, add_special_tokens=False)
        # A token that the window's edge has split may count as many.
        if len(ids) >= cut.keep + text.longest_token:
            return ids
    text.check_length(given, most, param)
    return text.encode_now(given, add_special_tokens=False)


def _special_ids(text: Text) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before a text and behind it."""
    plain = text.encode_now("a", add_special_tokens=False)
    whole = text.encode_now("a")
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin], whole[begin + len(plain) :]
    return [], []


async def first_tokens(text: Text, given: str, count: int, *, most: int, param: str) -> str:
    """The text of the first `count` tokens, or all of it where there are no more.

    Raises InvalidRequestError where the model's tokenizer doesn't tell where tokens end.
    """
    spans = await text.spans(given, most=CONTEXTS * most, param=param, add_special_tokens=False)
    if len(spans) <= count:
        return given
    return given[: min(spans[count - 1][2], spans[count][1])]
