"""Base of request bodies: the field types that they share, and refusal of unsupported fields.

An unknown field is refused by name, unless its value asks for nothing. A field of OpenAI's or
vLLM's API that this server does not support is refused with a remedy, unless its value is neutral.
Hints, which change no answer, are dropped whatever they say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from annotated_types import Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    GetJsonSchemaHandler,
    SkipValidation,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError

from quickchange_server.errors import QuickchangeError
from quickchange_server.protocol import MOST_LOGPROB_IDS, MOST_TOKENS, SamplingParams
from quickchange_store.names import did_you_mean

# Types of validation errors whose context names the field
UNSUPPORTED = "unsupported"
UNKNOWN = "unknown_field"
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_CHOICES = 128

MAX_PROMPTS = 2_048  # OpenAI's limit of a list of inputs
MAX_COMPONENTS = 32  # adapters in one composition
MOST_WEIGHT = 1_000.0
MAX_PATH = 4_096  # characters of a folder's path, as in Linux
MAX_BIASES = 10_000
MAX_SHOWN = 20  # wrong entries that a message tells, and characters of each
MAX_LISTED_IDS = 10_000  # in stop_token_ids
MAX_ALLOWED_IDS = 2**18  # no fewer than a vocabulary's
MAX_BAD_WORDS = 128

T = TypeVar("T")
Number = FiniteFloat
Name = Annotated[str, Field(max_length=512)]  # of a model, an adapter, a drafter
Json = dict[str, Any]  # a JSON object of an answer
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """An unsupported field of another API: what to do instead, and its neutral values."""

    remedy: str
    neutral: tuple[Any, ...] = ()

    def asks(self, value: Any) -> bool:
        # `1 == True` in Python, so compare types as well.
        return not any(type(value) is type(known) and value == known for known in self.neutral)


def asks_nothing(value: Any) -> bool:
    """True for null, false, an empty list and an empty object: what clients send for "not this"."""
    return value is None or value is False or value == [] or value == {}


def sampling_fields(
    names: Collection[str], narrowed: Mapping[str, Interval]
) -> dict[str, tuple[Any, Any]]:
    """Fields for `create_model` with the types, ranges and defaults of SamplingParams.

    `narrowed`: smaller ranges, where a route's own API has them.
    """
    hints = get_type_hints(SamplingParams, include_extras=True)
    made = {}
    for field in fields(SamplingParams):
        if field.name in names:
            kind, *ranges = get_args(hints[field.name]) or (hints[field.name],)
            kind = Number if kind is float else kind
            for interval in (*ranges, *filter(None, [narrowed.get(field.name)])):
                kind = Annotated[kind, interval]
            made[field.name] = (kind, field.default)
    return made


@dataclass(frozen=True, slots=True)
class Refused:
    """What stands for a body that has been validated and found wrong: its error is raised in place
    of a validation."""

    error: QuickchangeError


_NOTHING: JsonSchemaValue = {  # the schema of `asks_nothing`
    "anyOf": [
        {"type": "null"},
        {"type": "boolean", "const": False},
        {"type": "array", "maxItems": 0},
        {"type": "object", "maxProperties": 0},
    ]
}


class Body(BaseModel):
    """Base of bodies. `null` means the default, as in OpenAI's API; types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    null_is_default: ClassVar[bool] = True
    hints: ClassVar[frozenset[str]] = frozenset()  # of other APIs; no answer depends on them

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, Refused):
            raise body.error
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            known = cls.unsupported.get(name)
            if known is not None:
                if value is not None and known.asks(value):
                    raise PydanticCustomError(
                        UNSUPPORTED,
                        "not supported by this server; {remedy}",
                        {"remedy": known.remedy, "field": name},
                    )
            elif name in cls._names():
                if not (value is None and cls.null_is_default):
                    kept[name] = value
            elif name not in cls.hints and not asks_nothing(value):
                remedy = did_you_mean(name, cls._names(), otherwise="remove it;")
                context = {"field": name, "remedy": remedy}
                raise PydanticCustomError(UNKNOWN, "unknown field", context)
        return kept

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        """The fields' names, as they may be given."""
        names = {field.alias or name for name, field in cls.model_fields.items()}
        by_name = cls.model_config.get("populate_by_name", False)
        return frozenset(names | set(cls.model_fields) if by_name else names)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON schema, with `null` allowed for fields that have a default."""
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        own["additionalProperties"] = _NOTHING
        for name in cls.unsupported:  # a field that a base class has
            own.get("properties", {}).pop(name, None)
        for name, field in own.get("properties", {}).items():
            if name not in own.get("required", ()) and not _takes_null(field):
                shown = {key: field.pop(key) for key in ("title", "default") if key in field}
                own["properties"][name] = {"anyOf": [field, {"type": "null"}], **shown}
        return schema


def _takes_null(field: Mapping[str, Any]) -> bool:
    untyped = not {"type", "anyOf", "$ref", "enum", "const"} & field.keys()
    return untyped or {"type": "null"} in field.get("anyOf", ())


def check_length(most: int) -> BeforeValidator:
    """A check that a list or an object has at most `most` entries, before any is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            context = {"field_type": "Value", "max_length": most, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def check_prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """Check the four forms of a prompt. A union would try all of them on long lists."""
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, list) and value:
        if _is_ids(value):
            return value
        if len(value) > MAX_PROMPTS and isinstance(value[0], str | list):
            raise PydanticCustomError(
                "prompt", "has more than {most} prompts; send fewer", {"most": MAX_PROMPTS}
            )
        if all(isinstance(item, str) for item in value):
            return [check_text(item) for item in value]
        if all(_is_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt",
        "must be a string, a list of strings, a list of token ids, or a list of such lists; "
        "not empty",
    )


def check_text(value: str) -> str:
    """Check that a text has no lone surrogates."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "string_unicode", "must be valid Unicode: it holds half of a surrogate pair"
            ) from error
    return value


def check_stops(value: Any) -> list[str]:
    """Stop strings as a list, from one or several."""
    stops = [value] if isinstance(value, str) else value
    wrong = not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops)
    if wrong or len(stops) > MAX_STOPS or not all(0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise PydanticCustomError(
            "stop",
            "must be a string, or a list of at most {most} strings, each of 1 to {length} "
            "characters",
            {"most": MAX_STOPS, "length": MAX_STOP_LENGTH},
        )
    return [check_text(stop) for stop in stops]


def check_word(value: str) -> str:
    """Check that a word is more than spaces."""
    if not value.strip():
        raise PydanticCustomError("word", "must not be empty; remove it")
    return check_text(value)


def check_bias(value: Any) -> dict[int, float]:
    """OpenAI's logit_bias, from token ids as strings to -100..100, with ids as integers."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids to numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "logit_bias", "has more than {most} tokens; bias fewer", {"most": MAX_BIASES}
        )
    _refuse_entries(
        [key for key in value if not (key.isascii() and key.isdecimal() and len(key) < 10)],
        "its keys must be token ids in decimal digits, unlike",
    )
    _refuse_entries(
        [key for key, bias in value.items() if not _is_bias(bias)],
        "its values must be numbers from -100 to 100, unlike that of",
    )
    return {int(token_id): float(bias) for token_id, bias in value.items()}


def _is_bias(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -100 <= value <= 100


def _refuse_entries(keys: list[str], problem: str) -> None:
    """Raise for these entries of a logit_bias, which are told, the first of many."""
    if keys:
        shown = ", ".join(repr(key[:MAX_SHOWN]) for key in keys[:MAX_SHOWN])
        raise PydanticCustomError("logit_bias", "{problem}", {"problem": f"{problem} {shown}"})


BadWord = Annotated[str, Field(max_length=MAX_STOP_LENGTH), AfterValidator(check_word)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[  # with OpenAI's limits
    dict[MetadataKey, MetadataValue], Field(max_length=16), check_length(16)
]
_STOP: JsonSchemaValue = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOPS: JsonSchemaValue = {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}
_BIASES: JsonSchemaValue = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_BIASES,
}
_IDS: JsonSchemaValue = {"type": "array", "items": {"type": "integer"}}
_PROMPTS: list[JsonSchemaValue] = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
    {**_IDS, "minItems": 1},
    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
]

Prompt = Annotated[
    SkipValidation[str | list[str] | list[int] | list[list[int]]],
    BeforeValidator(check_prompt),
    WithJsonSchema({"anyOf": _PROMPTS}),
]
Stops = Annotated[
    SkipValidation[list[str]],
    BeforeValidator(check_stops),
    WithJsonSchema({"anyOf": [_STOP, _STOPS]}),
]
LogitBias = Annotated[
    SkipValidation[dict[int, float]], BeforeValidator(check_bias), WithJsonSchema(_BIASES)
]


MergeWeight = Annotated[Number, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)]


class WeightedAdapter(Body):
    """One term of a composition Σ weightᵢ · adapterᵢ, for tokens at positions [begin, end) of the
    text: prompt and output together, from 0."""

    id: Name
    weight: MergeWeight = 1.0
    begin: int = Field(0, ge=0, le=MOST_TOKENS)
    end: int | None = Field(None, ge=1, le=MOST_TOKENS)  # null: to the end of the text

    @model_validator(mode="after")
    def _check_span(self) -> Self:
        if self.end is not None and self.end <= self.begin:
            raise PydanticCustomError(
                "span",
                "end ({end}) must be behind begin ({begin}): the adapter serves the tokens from "
                "begin on and before end",
                {"begin": self.begin, "end": self.end},
            )
        return self


Adapters = Annotated[list[WeightedAdapter], Field(max_length=MAX_COMPONENTS, fail_fast=True)]

# Sampling fields with types of their own in bodies: bounded by the server, or in JSON's form.
_OWN = frozenset(
    {"n", "max_tokens", "min_tokens", "stop", "stop_token_ids", "seed", "logit_bias"}
    | {"logprobs", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "bad_words"}
)
SAMPLING = tuple(field.name for field in fields(SamplingParams))

if TYPE_CHECKING:

    class _SamplingFields(Body):
        """Fields that `GenerationRequest.sampling_params` reads."""

else:
    _SamplingFields = create_model(
        "SamplingFields",
        __base__=Body,
        **sampling_fields(
            [name for name in SAMPLING if name not in _OWN],
            narrowed={"temperature": Interval(le=2)},  # OpenAI's range
        ),
    )


class SamplingBody(_SamplingFields):
    """Sampling fields of a body, most of them made from SamplingParams."""

    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops = Field(default=[])
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: LogitBias = Field(default={})
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: list[int] = Field(default=[], max_length=MAX_LISTED_IDS, fail_fast=True)
    logprob_token_ids: list[int] = Field(default=[], max_length=MOST_LOGPROB_IDS, fail_fast=True)
    allowed_token_ids: list[int] = Field(default=[], max_length=MAX_ALLOWED_IDS, fail_fast=True)
    bad_words: list[BadWord] = Field(default=[], max_length=MAX_BAD_WORDS, fail_fast=True)
