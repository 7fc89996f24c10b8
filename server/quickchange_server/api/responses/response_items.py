"""Items of a response's input: messages, function calls and their outputs, reasoning, references.

What a response gives as output is taken as input again. Knows nothing of chats or of storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    TypeAdapter,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from quickchange_server.api.openai.chat.chat_requests import MAX_MESSAGES, MAX_PARTS
from quickchange_server.api.openai.chat.tool_requests import (
    ECHOED,
    MAX_ARGUMENTS,
    ValidText,
    arguments_text,
)
from quickchange_server.frontend.request_base import Body, Json, Name

PartKind = Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
ItemKind = Literal[
    "message", "function_call", "function_call_output", "reasoning", "item_reference"
]
_PARTS: tuple[str, ...] = PartKind.__args__  # type: ignore[attr-defined]
_KINDS: tuple[str, ...] = ItemKind.__args__  # type: ignore[attr-defined]
# What OpenAI's API puts into items, or clients leave there; no answer depends on it.
_ITEM_HINTS = ECHOED | {"status", "phase", "created_by", "parsed", "parsed_arguments", "caller"}
_PART_HINTS = ECHOED | {"annotations", "logprobs", "parsed", "id"}


class OrText:
    """Lets the JSON schema of a list have a string in the list's place."""

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(core)]}


def _check_part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _PARTS:
        raise PydanticCustomError(
            "part",
            "{kind} is not served: this server reads text alone; send parts of the type input_text",
            {"kind": repr(kind), "field": "type"},
        )
    return value


class TextPart(Body):
    """A part of a content: text, whoever wrote it, or a refusal."""

    hints = _PART_HINTS

    type: PartKind
    text: ValidText | None = None
    refusal: ValidText | None = None

    @property
    def said(self) -> str:
        return self.text or self.refusal or ""

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        own, other = ("refusal", "text") if self.type == "refusal" else ("text", "refusal")
        if getattr(self, own) is None:
            raise PydanticCustomError("missing", "is required", {"field": own})
        if getattr(self, other) is not None:
            raise PydanticCustomError(
                "part", "belongs to parts of another type; remove it", {"field": other}
            )
        return self


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Part = Annotated[TextPart, BeforeValidator(_check_part)]
Parts = Annotated[
    list[Part],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_parts),
    OrText(),
]


def joined(parts: list[TextPart]) -> str:
    """A content as one text, its parts joined as a chat's are."""
    return "\n".join(part.said for part in parts)


class InputMessage(Body):
    """A message; `developer` is served as `system`."""

    hints = _ITEM_HINTS

    type: Literal["message"] = "message"
    id: Name | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts

    def stored(self) -> Json:
        """The item as the API tells it."""
        if self.role != "assistant":
            content = [{"type": "input_text", "text": part.said} for part in self.content]
        else:
            content = [_output_part(part) for part in self.content]
        message = {"type": "message", "role": self.role, "status": "completed"}
        return {**message, "content": content}


def _output_part(part: TextPart) -> Json:
    if part.type == "refusal":
        return {"type": "refusal", "refusal": part.said}
    return {"type": "output_text", "text": part.said, "annotations": []}


class CallItem(Body):
    """A function call that the model made. Its arguments may be no JSON: a model wrote them."""

    hints = _ITEM_HINTS

    type: Literal["function_call"]
    id: Name | None = None
    call_id: Name
    name: ValidText
    arguments: Annotated[
        ValidText, Field(max_length=MAX_ARGUMENTS), BeforeValidator(arguments_text)
    ] = ""

    def stored(self) -> Json:
        """The item as the API tells it."""
        call = {"type": "function_call", "status": "completed", "call_id": self.call_id}
        return {**call, "name": self.name, "arguments": self.arguments}


class CallOutput(Body):
    """What a function call came to."""

    hints = _ITEM_HINTS

    type: Literal["function_call_output"]
    id: Name | None = None
    call_id: Name
    output: Parts

    def stored(self) -> Json:
        """The item as the API tells it."""
        made = {"type": "function_call_output", "status": "completed", "call_id": self.call_id}
        return {**made, "output": joined(self.output)}


class ReasoningItem(Body):
    """Reasoning of an earlier answer. What another server has encrypted can't be read here."""

    hints = _ITEM_HINTS | {"encrypted_content"}

    type: Literal["reasoning"]
    id: Name | None = None
    summary: Parts = Field(default=[])
    content: Parts = Field(default=[])

    @property
    def text(self) -> str:
        return joined(self.content or self.summary)

    def stored(self) -> Json:
        """The item as the API tells it."""
        summary = [{"type": "summary_text", "text": part.said} for part in self.summary]
        content = [{"type": "reasoning_text", "text": part.said} for part in self.content]
        return {"type": "reasoning", "summary": summary, "content": content}


class ItemReference(Body):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: Name


def _kind(value: Any) -> str:
    """An item's type; without one it is a message or, with an id alone, a reference."""
    if not isinstance(value, Mapping):
        return "message" if value is None else str(getattr(value, "type", "message"))
    kind = value.get("type")
    if isinstance(kind, str):
        return kind
    return "item_reference" if "id" in value and "role" not in value else "message"


def _check_item(value: Any) -> Any:
    if isinstance(value, dict) and (kind := _kind(value)) not in _KINDS:
        raise PydanticCustomError(
            "item",
            "{kind} is not served: items are messages, calls of your functions and their outputs "
            "(function_call, function_call_output), reasoning and item_reference; remove it",
            {"kind": repr(kind), "field": "type"},
        )
    return value


ContextItem = InputMessage | CallItem | CallOutput | ReasoningItem
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
    BeforeValidator(_check_item),
]


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_items),
    OrText(),
]

_STORED: TypeAdapter[Any] = TypeAdapter(InputItem)


def item_of(stored: Json) -> ContextItem:
    """An item as it was stored."""
    item: ContextItem = _STORED.validate_python(stored)
    return item
