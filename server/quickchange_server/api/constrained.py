"""The fields of a body that constrain the text: OpenAI's `response_format`, vLLM's `guided_*` and
`structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from quickchange_server.api.fields import Body, Unsupported

MOST_CHOICES = 1_000
_PLAIN = "remove it"

Choice = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MOST_CHOICES)]


def _check_schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("schema", "must be a JSON schema: an object, true or false")
    return value


def _check_written(value: Any) -> Any:
    return value if isinstance(value, str) else _check_schema(value)


Schema = Annotated[
    Any, BeforeValidator(_check_schema), WithJsonSchema({"type": ["object", "boolean"]})
]
Written = Annotated[  # or a string of JSON, as vLLM takes it
    Any, BeforeValidator(_check_written), WithJsonSchema({"type": ["object", "boolean", "string"]})
]
Source = Annotated[str, Field(min_length=1)]


class JsonSchema(Body):
    """OpenAI's form. The schema is always enforced, so `strict` changes nothing; `name` and
    `description` are informational. Without a schema any JSON object will do."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    model_config = ConfigDict(populate_by_name=True)

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "structural_tag": Unsupported("use grammar"),
        "disable_fallback": Unsupported(_PLAIN, (True, False)),
        "disable_any_whitespace": Unsupported("use regex or grammar", (False,)),
        "disable_additional_properties": Unsupported("set additionalProperties", (False,)),
        "whitespace_pattern": Unsupported("use regex or grammar"),
    }

    json_: Written | None = Field(None, alias="json")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    json_object: bool | None = None


class Constrained(Body):
    response_format: ResponseFormat | None = None
    guided_json: Written | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    structured_outputs: StructuredOutputs | None = None


UNSUPPORTED: Mapping[str, Unsupported] = {
    "guided_decoding_backend": Unsupported("there is one; remove it"),
    "guided_whitespace_pattern": Unsupported("use guided_regex or guided_grammar"),
}
