"""Content blocks of Anthropic's messages, and the messages of chats that they mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quickchange_server.api.openai.chat.chat_requests import MAX_PARTS
from quickchange_server.api.openai.chat.tool_requests import MAX_ARGUMENTS, ValidText
from quickchange_server.frontend.request_base import Body, Json

# Claude Code's first line of a system prompt: it differs in every request, so nothing behind it
# would be found in the prefix cache.
BILLING = "x-anthropic-billing-header"


class Cacheable(Body):
    """A part of a request that may end a prefix to cache. Every prefix is cached anyway, so this
    changes nothing but what the usage tells."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Cacheable):
    hints = frozenset({"citations"})

    type: Literal["text"]
    text: ValidText


class ThinkingBlock(Body):
    """Reasoning of an earlier answer, which the chat template may show or leave out."""

    type: Literal["thinking"]
    thinking: ValidText
    signature: str = ""  # nothing checks it


class RedactedThinkingBlock(Body):
    """Reasoning that only its maker can read; left out."""

    type: Literal["redacted_thinking"]
    data: str = ""


def _check_input(value: dict[str, Any]) -> dict[str, Any]:
    written = json.dumps(value, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "string_unicode", "must be valid Unicode: it holds half of a surrogate pair"
        ) from error
    if len(written) > MAX_ARGUMENTS:
        raise PydanticCustomError(
            "input", "has more than {most} characters; shorten it", {"most": MAX_ARGUMENTS}
        )
    return value


class ToolUseBlock(Cacheable):
    """A call of a tool in an earlier answer."""

    hints = frozenset({"caller", "toolset_name"})

    type: Literal["tool_use"]
    id: ValidText
    name: ValidText
    input: Annotated[dict[str, Any], AfterValidator(_check_input)]


class ToolReferenceBlock(Cacheable):
    """The name of a tool that a search found. All tools are shown to the model from the start."""

    type: Literal["tool_reference"]
    tool_name: ValidText


def _only(*kinds: str) -> BeforeValidator:
    """A check that a block is of one of these kinds, before its fields are looked at."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(value, dict) or kind is None:
            raise PydanticCustomError(
                "block", 'must be an object such as {"type": "text", "text": ...}'
            )
        if kind not in kinds:
            raise PydanticCustomError(
                "block",
                "{kind} is not a type that can stand here: {kinds} can, as this server reads text "
                "and no images or files; put what matters into a text block",
                {"field": "type", "kind": repr(kind)[:80], "kinds": ", ".join(kinds)},
            )
        return value

    return BeforeValidator(check)


def _kind(value: Any) -> str:
    """The tag of a block; unlike its type it is no field's name, so it is in no error's path."""
    kind = value["type"] if isinstance(value, dict) else value.type
    return f"{kind}_block"


Text = Annotated[TextBlock, _only("text")]
ResultPart = Annotated[
    Annotated[TextBlock, Tag("text_block")]
    | Annotated[ToolReferenceBlock, Tag("tool_reference_block")],
    Discriminator(_kind),
    _only("text", "tool_reference"),
]


class ToolResultBlock(Cacheable):
    """What a tool gave for an earlier call."""

    hints = frozenset({"toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: ValidText
    content: (
        ValidText | Annotated[list[ResultPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    ) = ""
    is_error: bool = False

    def for_chat(self) -> Json:
        text = self.content if isinstance(self.content, str) else join_texts(self.content)
        return {
            "role": "tool",
            "tool_call_id": self.tool_use_id,
            # Chat templates have no other place for it.
            "content": f"Error: {text}" if self.is_error else text,
        }


Block = Annotated[
    Annotated[TextBlock, Tag("text_block")]
    | Annotated[ThinkingBlock, Tag("thinking_block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking_block")]
    | Annotated[ToolUseBlock, Tag("tool_use_block")]
    | Annotated[ToolResultBlock, Tag("tool_result_block")],
    Discriminator(_kind),
    _only("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
_ROLES: Mapping[type[Body], str] = {
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
    ToolUseBlock: "assistant",
    ToolResultBlock: "user",
}


def join_texts(blocks: Iterable[Body]) -> str:
    """The texts of blocks, joined as a chat's text parts are; other blocks have none."""
    texts = (
        block.text if isinstance(block, TextBlock) else block.tool_name
        for block in blocks
        if isinstance(block, TextBlock | ToolReferenceBlock)
    )
    return "\n".join(texts)


def system_text(blocks: Iterable[Body]) -> str:
    """The text of a system prompt."""
    return join_texts(
        block
        for block in blocks
        if not (isinstance(block, TextBlock) and block.text.startswith(BILLING))
    )


class Turn(Body):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: ValidText | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)]

    @property
    def blocks(self) -> Sequence[Body]:
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content

    @model_validator(mode="after")
    def _check_role(self) -> Turn:
        for index, block in enumerate(self.blocks):
            owner = _ROLES.get(type(block), self.role)
            if owner != self.role:
                raise PydanticCustomError(
                    "block",
                    "belongs to messages of the role {owner}",
                    {"field": f"content[{index}]", "owner": owner},
                )
        return self

    def for_chat(self) -> Iterator[Json]:
        """The chat's messages that say the same, in their order."""
        if self.role == "assistant":
            yield self._answer()
            return
        if self.role == "system":
            yield {"role": "system", "content": system_text(self.blocks)}
            return
        texts: list[Body] = []
        for block in self.blocks:
            if isinstance(block, ToolResultBlock):
                if texts:
                    yield {"role": "user", "content": join_texts(texts)}
                    texts = []
                yield block.for_chat()
            else:
                texts.append(block)
        if texts or not self.blocks:
            yield {"role": "user", "content": join_texts(texts)}

    def _answer(self) -> Json:
        message: Json = {"role": "assistant", "content": join_texts(self.blocks)}
        thoughts = [block.thinking for block in self.blocks if isinstance(block, ThinkingBlock)]
        if any(thoughts):
            message["reasoning_content"] = "\n".join(thoughts)
        calls = [block for block in self.blocks if isinstance(block, ToolUseBlock)]
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.input, ensure_ascii=False),
                    },
                }
                for call in calls
            ]
        return message


class Conversation:
    """A chat's messages as they are put together, each with the message that it came from."""

    _JOINED: ClassVar = ("user", "assistant")  # several in a row are one turn, as at Anthropic

    def __init__(self, system: str) -> None:
        self.messages: list[Json] = [{"role": "system", "content": system}] if system else []
        self.origins: list[int | None] = [None for _ in self.messages]  # None: the system prompt

    @property
    def ends_open(self) -> bool:
        """True if the answer goes on with the last message, which is the beginning of one."""
        last = self.messages[-1]
        return last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last

    def add(self, index: int, turn: Turn) -> None:
        for message in turn.for_chat():
            last = self.messages[-1] if self.messages else {"role": ""}
            if last["role"] == message["role"] and message["role"] in self._JOINED:
                self._join(last, message)
            else:
                self.messages.append(message)
                self.origins.append(index)

    def _join(self, last: Json, message: Json) -> None:
        for name in ("content", "reasoning_content"):
            parts = [text for text in (last.get(name), message.get(name)) if text]
            if parts:
                last[name] = "\n".join(parts)
        if "tool_calls" in message:
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
