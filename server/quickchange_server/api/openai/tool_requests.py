"""Fields of a chat's body for tools: functions, the choice among them, calls made before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from quickchange_server.frontend.request_base import Body, FunctionName, Unsupported, check_text

MAX_TOOLS = 128  # OpenAI's limit
MAX_ARGUMENTS = 256 * 1024  # characters of one call's

ValidText = Annotated[str, AfterValidator(check_text)]


def check_arguments(value: str) -> str:
    """Check that a call's arguments are a JSON object as text."""
    try:
        arguments = json.loads(value)
    except json.JSONDecodeError as error:
        raise PydanticCustomError(
            "arguments", "must be a JSON object as text: {reason}", {"reason": str(error)}
        ) from error
    if not isinstance(arguments, dict):
        raise PydanticCustomError("arguments", "must be a JSON object as text")
    return check_text(value)


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: ValidText | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # only where tool_choice makes the model call: docs/tools.md


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The function in the form that chat templates expect."""
        function: dict[str, Any] = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": self.function.parameters or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


class ChosenFunction(Body):
    name: FunctionName


class ChosenTool(Body):
    """The one function that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(Body):
    name: FunctionName
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENTS), AfterValidator(check_arguments)]


class MadeCall(Body):
    """A call in an earlier message of the assistant."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "index": Unsupported("it belongs to streamed events; remove it", tuple(range(MAX_TOOLS)))
    }

    id: ValidText
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call in the form that chat templates expect: the arguments as an object."""
        arguments = json.loads(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


ToolChoice = Literal["none", "auto", "required"] | ChosenTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
