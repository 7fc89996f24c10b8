"""Bodies of OpenAI's generation routes, with vLLM's extra fields and this server's own.

docs/http.md says what each field does, its default and its range. `text_constraints.py` turns the
fields that constrain the text into one constraint. Knows nothing of routes or of the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from quickchange_server.adapter_registry.resolver import AUTO
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.request_base import (
    MAX_CHOICES,
    SAMPLING,
    Adapters,
    Body,
    Metadata,
    Name,
    Prompt,
    SamplingBody,
    Unsupported,
)
from quickchange_server.protocol import ALL, MOST_TOKENS, SamplingParams

MAX_LOGPROBS = 20  # OpenAI's, where the setting max_logprobs doesn't count
MAX_SALT = 1_024  # characters, vLLM's limit
MAX_SCHEMA = 64 * 1024  # characters of a schema as JSON
MAX_WRITTEN = 256 * 1024  # characters of a schema as text
MOST_CHOICES = 1_000  # in guided_choice
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat may use the rest of the context

REMOVE = "remove it"  # the remedy for unsupported fields

# --- fields that constrain the text -------------------------------------------------------------

Source = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Source], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]


def _check_schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("schema", "must be a JSON schema: an object, true or false")
    _check_size(value)
    return value


def _check_size(schema: Any) -> None:
    """Refuse a schema whose JSON would be too long, without making it."""
    size, parts = 0, [schema]
    while parts:
        part = parts.pop()
        size += len(part) if isinstance(part, str) else 1
        if size > MAX_SCHEMA:
            raise PydanticCustomError(
                "schema", f"has more than {MAX_SCHEMA} characters; simplify it"
            )
        if isinstance(part, dict):
            parts.extend(part)
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part[:MAX_SCHEMA])


def _check_written(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_WRITTEN:
        raise PydanticCustomError("schema", f"has more than {MAX_WRITTEN} characters; simplify it")
    return value if isinstance(value, str) else _check_schema(value)


Schema = Annotated[
    Any, BeforeValidator(_check_schema), WithJsonSchema({"type": ["object", "boolean"]})
]
Written = Annotated[  # a schema, or its JSON in a string, as vLLM takes it
    Any, BeforeValidator(_check_written), WithJsonSchema({"type": ["object", "boolean", "string"]})
]


class JsonSchema(Body):
    """OpenAI's form of a JSON schema.

    The schema is always enforced, so `strict` changes nothing; `name` and `description` are
    informational. Without a schema any JSON object will do.
    """

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's form of a constraint; `schema` beside json_object is LoRAX's, `value` TGI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")
    value: Schema | None = None

    @model_validator(mode="after")
    def _schema_of_objects(self) -> Self:
        if self.type != "json_object":
            for name, given in (("schema", self.schema_), ("value", self.value)):
                if given is not None:
                    raise PydanticCustomError(
                        "response_format",
                        "belongs to the type json_object; use json_schema",
                        {"field": name},
                    )
        elif self.schema_ is not None and self.value is not None:
            raise PydanticCustomError(
                "response_format", "is another name of schema; give one", {"field": "value"}
            )
        return self


class StructuredOutputs(Body):
    """vLLM's form of a constraint: one of these fields."""

    model_config = ConfigDict(populate_by_name=True)

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "structural_tag": Unsupported("use grammar"),
        "disable_fallback": Unsupported(REMOVE, (True, False)),
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
    """The fields of OpenAI and vLLM that constrain the text; at most one may be given."""

    response_format: ResponseFormat | None = None
    guided_json: Written | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    structured_outputs: StructuredOutputs | None = None


# --- what completions and chats share -----------------------------------------------------------


Part = TypeVar("Part")
BestTokens = Annotated[int, Field(ge=ALL, le=MOST_TOKENS)]  # of them, the setting max_logprobs


def wrong(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", param=field)


class StreamOptions(Body):
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "include_obfuscation": Unsupported(REMOVE, (False,)),
    }

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in every event


# Other APIs' wishes about storing, caching, routing and style. None changes what is answered here.
_HINTS = frozenset(
    {"store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"request_id", "session_id", "include_reasoning", "reasoning_effort", "verbosity"}
    | {"prediction", "stream_interval", "return_mm_kwargs", "priority"}
    # The spaces that it asks for are written by no tokenizer that is served.
    | {"spaces_between_special_tokens"}
)

_ONE_SERVER = "prompt and answer are made by one server; remove it"


SHARED: dict[str, Unsupported] = {
    "use_beam_search": Unsupported("use n with a temperature above 0", (False,)),
    "length_penalty": Unsupported(REMOVE, (1, 1.0)),
    "guided_decoding_backend": Unsupported("there is one; remove it"),
    "guided_whitespace_pattern": Unsupported("use guided_regex or guided_grammar"),
    "detokenize": Unsupported("text is always made; remove it", (True,)),
    "thinking_token_budget": Unsupported("set max_tokens", (-1,)),
    "routed_experts_prompt_start": Unsupported(REMOVE, (0,)),
    "repetition_detection": Unsupported("use frequency_penalty, and set max_tokens"),
    "watermarking": Unsupported(REMOVE, (False,)),
    "kv_transfer_params": Unsupported(_ONE_SERVER, ({},)),
    "ec_transfer_params": Unsupported(_ONE_SERVER, ({},)),
    "vllm_xargs": Unsupported("this server has no extensions to hand it to; remove it", ({},)),
    "prompt_embeds": Unsupported("give the prompt as text or token ids", ([],)),
}


TruncationSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """The number of a prompt's tokens that are kept; None: all. `side` is where the others go."""

    keep: int | None
    side: TruncationSide

    def of(self, ids: Sequence[Part]) -> list[Part]:
        """The ids that are kept."""
        if self.keep is None or len(ids) <= self.keep:
            return list(ids)
        return list(ids[: self.keep] if self.side == "right" else ids[len(ids) - self.keep :])


class GenerationRequest(Constrained, SamplingBody, ABC):
    """Base of completions and chats; most sampling fields are SamplingParams' own."""

    hints = _HINTS
    logprobs_field: ClassVar[str] = "logprobs"  # that says how many best tokens are told

    model: Name = ""  # the base
    adapters: Adapters = Field(default=[])
    turbo: Name = AUTO  # the source of drafts
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # the unit of experiments, unless they define another
    metadata: Metadata = Field(default={})  # a field of it may be an experiment's unit
    prompt_logprobs: BestTokens | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # in `logprobs`, in place of their texts
    truncate_prompt_tokens: int | None = Field(None, ge=-1)  # -1: to what fits
    truncation_side: TruncationSide = "left"
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT)

    @property
    def wanted_tokens(self) -> int | None:
        """Limit of new tokens, if the client gave one."""
        return self.max_tokens

    @property
    def candidates(self) -> int:
        """Choices generated for each prompt, of which `n` are returned."""
        return self.n

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """Value of `SamplingParams.prompt_logprobs`."""
        return self.prompt_logprobs

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """Value of `SamplingParams.logprobs`."""

    def check_logprobs(self, most: int, vocabulary: int) -> None:
        """Raise InvalidRequestError for more best tokens than the setting max_logprobs allows."""
        allowed = vocabulary if most == ALL else most
        of_answer = None if self.logprob_token_ids else self.wanted_logprobs
        for kind, field, wanted in (
            ("sample", self.logprobs_field, of_answer),
            ("prompt", "prompt_logprobs", self.prompt_logprobs),
        ):
            count = vocabulary if wanted == ALL else wanted or 0
            if count > allowed:
                raise wrong(
                    field,
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: "
                    f"{allowed}; ask for fewer, or start the server with --max-logprobs",
                )

    def sampling_params(self) -> SamplingParams:
        """The body's sampling fields, before `resolved` fills in what the engine needs."""
        given = {name: getattr(self, name) for name in SAMPLING if name in type(self).model_fields}
        given |= {
            "max_tokens": self.wanted_tokens,
            "logprobs": self.wanted_logprobs,
            "prompt_logprobs": self.wanted_prompt_logprobs,
        }
        return SamplingParams(**given)

    def most_prompt_tokens(self, limit: int) -> int:
        """Tokens of the longest prompt that is read, in a context of `limit`."""
        return limit if self.truncate_prompt_tokens is None else CONTEXTS * limit

    def truncated(self, prompt: list[Part], limit: int) -> list[Part]:
        """The prompt as it is served in a context of `limit` tokens, or what is said of each."""
        length = self.truncate_prompt_tokens
        if length == -1:
            length = max(1, limit - max(1, self.wanted_tokens or 1))
        return Truncation(length, self.truncation_side).of(prompt)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """True if every event of the stream has the usage so far; only with `include_usage`."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        options = self.stream_options
        if options not in (None, StreamOptions()) and not self.stream:
            raise wrong("stream_options", "only with stream set to true; remove it, or set stream")
        wanted = self.wanted_tokens
        if wanted is not None and self.min_tokens > wanted:
            raise wrong("min_tokens", f"{self.min_tokens} exceeds max_tokens, {wanted}; lower it")
        if self.logprob_token_ids and self.wanted_logprobs is None:
            raise wrong("logprob_token_ids", "only with logprobs; ask for them, or remove it")
        if self.truncate_prompt_tokens == 0:
            raise wrong("truncate_prompt_tokens", "0 leaves no prompt; raise it, or leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise wrong(
                "prompt_logprobs",
                "only in an answer that is not streamed; remove it, or remove stream",
            )
        return self


# --- completions --------------------------------------------------------------------------------


def _not_false(value: Any) -> Any:
    """A chat's way to ask for no log-probabilities, which clients send to completions too."""
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **SHARED,
        "suffix": Unsupported("write the fill-in format of the model into the prompt", ("",)),
    }

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0)
    logprobs: Annotated[BestTokens | None, BeforeValidator(_not_false)] = None
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    add_special_tokens: bool = True  # of the tokenizer, to a prompt that is text

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        wanted = [top for top in (echoed, self.prompt_logprobs) if top is not None]
        return ALL if ALL in wanted else max(wanted, default=None)

    @property
    def wanted_logprobs(self) -> int | None:
        ranked = self.candidates > self.n  # by log-probability
        return 0 if self.logprobs is None and ranked else self.logprobs

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise wrong(
                "max_tokens", "0 needs echo or prompt_logprobs; raise it, or ask for one of them"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise wrong("best_of", f"{self.best_of} is less than n, {self.n}; raise it")
        if self.stream and self.candidates > self.n:
            raise wrong("best_of", "the best are known at the end alone; remove it, or stream")
        return self
