"""Fields of a chat's body for tools: functions, the choice among them, calls made before."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from quickchange_server.frontend.request_base import Body, FunctionName, check_text

MAX_TOOLS = 128  # OpenAI's limit
MAX_ARGUMENTS = 256 * 1024  # characters of one call's

ValidText = Annotated[str, AfterValidator(check_text)]


def arguments_text(value: Any) -> Any:
    """A call's arguments as text; some clients send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


# Another server's own fields, which clients send back with a model's message.
ECHOED = frozenset({"provider_specific_fields", "cache_control"})


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    hints = ECHOED | {"return", "returns"}

    name: FunctionName
    description: ValidText | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls of it fit its schema, whoever chose to call: docs/tools.md


class Tool(Body):
    hints = ECHOED

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The function in the form that chat templates expect: without a description that it
        doesn't have, which is text of the prompt."""
        described = self.function.description is not None
        function: dict[str, Any] = {
            "name": self.function.name,
            **({"description": self.function.description} if described else {}),
            "parameters": self.function.parameters or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


class ChosenFunction(Body):
    name: FunctionName


MODES = ("none", "auto", "required")


class ChoiceOfTools(Body):
    """Base of who chooses to call: one of `MODES` as a string in the body, or an object."""

    object_form: ClassVar[JsonSchemaValue] = {}  # what the JSON schema of the object has besides

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON schema: a string, or the object."""
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        chosen = {**own, **cls.object_form}
        own.clear()
        own |= {"anyOf": [{"type": "string", "enum": list(MODES)}, chosen]}
        return schema


class ToolChoice(ChoiceOfTools):
    """Who chooses to call: a string in the body, or an object that names a function."""

    object_form: ClassVar[JsonSchemaValue] = {"required": ["function"]}

    type: Literal["none", "auto", "required", "function"]
    function: ChosenFunction | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value in MODES:
            return {"type": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("tool_choice", _CHOICES)
        if "type" not in value and value.get("function") is not None:
            value = {"type": "function", **value}  # huggingface_hub's own class has no type
        if value.get("type") == "function" and value.get("function") is None:
            raise PydanticCustomError("missing", "is required", {"field": "function"})
        return value


_CHOICES = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


class CalledFunction(Body):
    """The function of an earlier call. Its arguments may be no JSON: a model wrote them."""

    hints = ECHOED | {"parsed_arguments"}

    name: ValidText
    arguments: Annotated[
        ValidText, Field(max_length=MAX_ARGUMENTS), BeforeValidator(arguments_text)
    ] = ""


class MadeCall(Body):
    """A call in an earlier message of the assistant."""

    hints = ECHOED | {"index"}

    id: ValidText = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call in the form that chat templates expect: the arguments as an object, or as the
        text that they are where that is none."""
        function = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _object(arguments: str) -> dict[str, Any] | str:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
