"""Translation of a response's body into a chat, and of the chat's errors back.

An error names the field that the client sent: `input[2].content`, `text.format.schema`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from quickchange_server.api.error_responses import from_validation
from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.responses.response_context import Context
from quickchange_server.api.responses.response_items import (
    CallItem,
    CallOutput,
    ContextItem,
    InputMessage,
    ReasoningItem,
    joined,
)
from quickchange_server.api.responses.response_requests import ResponseRequest
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.request_base import Json

# Fields that both bodies have and mean alike. A chat takes its own form of the others.
_OTHERWISE = {"stream_options", "tools", "tool_choice", "logit_bias", "top_logprobs"}
_ALIKE = (
    (ResponseRequest.model_fields.keys() & ChatRequest.model_fields.keys())
    - ResponseRequest.unsupported.keys()
    - _OTHERWISE
)

# A chat's fields in error messages, and what the client calls them.
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"\bresponse_format\.json_schema\.schema\b", "text.format.schema"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\bmax_(completion_)?tokens\b", "max_output_tokens"),
    (r"\btools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"^messages\b", "input"),
)


@dataclass(frozen=True, slots=True)
class Translated:
    """A chat's messages, with the place of each in the client's body."""

    messages: list[Json]
    places: list[str]

    @property
    def turns(self) -> int:
        """Turns of the conversation, each of which begins with a user's message."""
        return len(self._begins)

    @property
    def _begins(self) -> list[int]:
        return [at for at, message in enumerate(self.messages) if message["role"] == "user"]

    def without(self, turns: int) -> Translated:
        """The messages without the oldest `turns`, fewer than there are. What stands before the
        first stays."""
        if not turns:
            return self
        first, until = self._begins[0], self._begins[turns]
        return Translated(
            self.messages[:first] + self.messages[until:],
            self.places[:first] + self.places[until:],
        )

    def renamed(self, error: QuickchangeError) -> QuickchangeError:
        """A chat's error, told of the client's own fields."""
        error.message = self._named(error.message)
        if error.param is not None:
            error.param = self._named(error.param)
        return error

    def _named(self, told: str) -> str:
        told = re.sub(r"^messages\[(\d+)\]", lambda found: self.places[int(found[1])], told)
        for field, name in _RENAMED:
            told = re.sub(field, name, told)
        return told


def translated(body: ResponseRequest, context: Context) -> Translated:
    """The messages of the chat: the instructions, then the items.

    A call belongs to the assistant's message before it, and reasoning to the one behind it.
    """
    made = Translated([], [])
    if body.instructions is not None:
        made.messages.append({"role": "system", "content": body.instructions})
        made.places.append("instructions")
    thought = ""
    for item, place in zip(context.items, context.places, strict=True):
        if isinstance(item, ReasoningItem):
            thought = item.text
            continue
        if isinstance(item, CallItem) and made.messages and _may_call(made.messages[-1], thought):
            made.messages[-1].setdefault("tool_calls", []).append(_call(item))
            continue
        message = _message(item)
        if message["role"] == "assistant" and thought:
            message["reasoning_content"] = thought
        thought = ""
        if _both_lead(made.messages, message):
            made.messages[0]["content"] += f"\n\n{message['content']}"
            continue
        made.messages.append(message)
        made.places.append(place)
    return made


def _may_call(message: Json, thought: str) -> bool:
    return message["role"] == "assistant" and not thought


def _both_lead(before: Sequence[Json], message: Json) -> bool:
    """True for a second system message at the beginning, where chat templates take one alone."""
    system = ("system", "developer")
    return len(before) == 1 and before[0]["role"] in system and message["role"] in system


def _message(item: ContextItem) -> Json:
    match item:
        case InputMessage():
            return {"role": item.role, "content": joined(item.content)}
        case CallItem():
            return {"role": "assistant", "content": None, "tool_calls": [_call(item)]}
        case CallOutput():
            content = joined(item.output)
            return {"role": "tool", "tool_call_id": item.call_id, "content": content}
        case ReasoningItem():
            return {"role": "assistant", "content": "", "reasoning_content": item.text}


def _call(item: CallItem) -> Json:
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def chat_of(body: ResponseRequest, made: Translated) -> ChatRequest:
    """The chat. Raises the client's error for what the two bodies check together."""
    chat: Json = {name: getattr(body, name) for name in body.model_fields_set & _ALIKE}
    wanted = body.wanted_logprobs
    chat |= {
        "messages": made.messages,
        "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in body.offered_tools],
        "tool_choice": _choice(body),
        "max_completion_tokens": body.max_output_tokens,
        "logit_bias": {str(token_id): bias for token_id, bias in body.logit_bias.items()},
        "logprobs": wanted is not None,
        "top_logprobs": wanted or 0,
        "response_format": _format(body),
        "reasoning_effort": body.reasoning.effort,
        "verbosity": body.text.verbosity,
    }
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise made.renamed(from_validation(found, chat)) from error
    except QuickchangeError as error:
        raise made.renamed(error) from None


def _tool(tool: Json) -> Json:
    del tool["type"]
    return {"type": "function", "function": tool}


def _choice(body: ResponseRequest) -> Json | str:
    choice = body.tool_choice
    match choice.type:
        case "function":
            return {"type": "function", "function": {"name": choice.name}}
        case "allowed_tools":
            return choice.mode
        case mode:
            return mode


def _format(body: ResponseRequest) -> Json | None:
    wanted = body.text.format
    if wanted.type != "json_schema":
        return None if wanted.type == "text" else {"type": wanted.type}
    return {"type": "json_schema", "json_schema": {"schema": wanted.schema_, "strict": True}}
