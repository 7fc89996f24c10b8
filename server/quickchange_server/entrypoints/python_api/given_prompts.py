"""Prompts and conversations as a call is given them, checked and tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from quickchange_server.api.openai.chat.chat_requests import ChatRendering, Message
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openai.chat.tool_requests import Tools
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.request_base import Body
from quickchange_server.frontend.tokenizer import Text

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]

_B = TypeVar("_B", bound=Body)


class ChatFields(ChatRendering):
    """The way in which conversations of one call become prompts."""

    tools: Tools = Field(default=[])


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A tokenized prompt; `place` names it in errors."""

    place: str
    text: str | None  # None: token ids were given
    ids: tuple[int, ...]
    spoken: Text  # the tokenizer under its adapter


class PromptReader:
    """Makes tokenized prompts, of `most` tokens each. Raises with the place of what is wrong."""

    def __init__(self, most: int) -> None:
        self._most = most

    def read(self, prompts: Sequence[Prompt], texts: Sequence[Text]) -> list[AskedPrompt]:
        """Prompts of a call, each by a tokenizer."""
        return [
            self._one(f"prompts[{i}]", *each)
            for i, each in enumerate(zip(prompts, texts, strict=True))
        ]

    def _one(self, place: str, prompt: Any, text: Text) -> AskedPrompt:
        if isinstance(prompt, str):
            ids = self._encode(place, prompt, text)
            text.check_ids(ids, place)
            return AskedPrompt(place, prompt, tuple(ids), text)
        if isinstance(prompt, Iterable):
            ids = list(prompt)
            if all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
                text.check_ids(ids, place)
                return AskedPrompt(place, None, tuple(map(int, ids)), text)
        raise InvalidRequestError(
            f"{place}: {type(prompt).__name__} is no prompt; give a text or a list of token ids",
            param=place,
        )

    def _encode(self, place: str, prompt: str, text: Text) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{place}: holds half of a surrogate pair; give valid Unicode", param=place
            ) from error
        return text.encode_within(prompt, most=self._most, param=place)

    def chat(
        self, place: str, messages: Conversation, rendering: ChatFields, text: Text
    ) -> AskedPrompt:
        """A conversation's prompt."""
        checked = [validated(Message, f"{place}[{i}]", m) for i, m in enumerate(messages)]
        if not checked:
            raise InvalidRequestError(f"{place}: is empty; give at least one message", param=place)
        tools_form(text, checked, rendering.tools)
        prompt = text.render_chat(
            [message.for_template() for message in checked],
            tools=[tool.for_template() for tool in rendering.tools],
            how=rendering.how,
            param=place,
        )
        ids = text.encode_within(prompt, most=self._most, param=place, add_special_tokens=False)
        text.check_ids(ids, place)
        return AskedPrompt(place, prompt, tuple(ids), text)


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a call is given them: one, or several."""
    found: Any = [prompts] if _is_one(prompts) else prompts
    return list(found)


def _is_one(prompts: Any) -> bool:
    """True for one prompt, false for a list of them."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], Integral)


def validated(model: type[_B], place: str, given: Any) -> _B:
    """The value as the HTTP API takes it. Raises with the place of what is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        finding = error.errors()[0]
        context = finding.get("ctx", {})
        field = [context["field"]] if "field" in context else []
        places = ([place] if place else []) + [*finding["loc"], *field]
        where = ".".join(map(str, places))
        raise InvalidRequestError(f"{where}: {finding['msg']}", param=where) from error
