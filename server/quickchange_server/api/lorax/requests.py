"""Bodies of LoRAX's routes. docs/lorax.md says what each field does and where it differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from quickchange_server.adapter_registry.resolver import AUTO
from quickchange_server.api.openai.requests import MAX_LOGPROBS, Schema, Source, Written
from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.request_base import (
    MAX_CHOICES,
    MAX_COMPONENTS,
    MAX_STOPS,
    Body,
    Json,
    MergeWeight,
    Name,
    Number,
    Unsupported,
    check_text,
)
from quickchange_store.combining.merging import MergeStrategy, SignMethod

MAX_STOP_SEQUENCES = 4  # LoRAX's default, reported by /info
AdapterSource = Literal["hub", "local", "s3", "pbase"]
ValidText = Annotated[str, AfterValidator(check_text)]


class MergedAdapters(Body):
    """Adapters to serve as one, and how to merge them."""

    ids: list[Name] = Field(min_length=1, max_length=MAX_COMPONENTS, fail_fast=True)
    weights: list[MergeWeight] = Field(min_length=1, max_length=MAX_COMPONENTS, fail_fast=True)
    merge_strategy: Literal["linear", MergeStrategy] = "linear"
    density: Number = Field(0.0, ge=0, le=1)
    majority_sign_method: SignMethod = "total"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if len(self.ids) != len(self.weights):
            raise InvalidRequestError(
                f"merged_adapters.weights: {len(self.weights)} for {len(self.ids)} ids; "
                "give one weight for each id",
                param="merged_adapters.weights",
            )
        if self.merge_strategy != "linear" and self.density == 0:
            raise InvalidRequestError(
                f"merged_adapters.density: {self.merge_strategy} merges the share of values that "
                "density keeps, and 0 keeps none; give a share such as 0.5",
                param="merged_adapters.density",
            )
        return self


class LoraxResponseFormat(Body):
    """A constraint on the text: JSON, with or without a schema."""

    type: Literal["json_object"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class SchemaOfGrammar(Body):
    """A JSON schema; `name` and `strict` change nothing, as it is always enforced."""

    hints = frozenset({"name", "strict"})

    json_schema: Schema = Field(alias="schema")


class JsonGrammar(Body):
    """TGI's form of a JSON schema, or of a text that is one."""

    type: Literal["json", "json_object"]
    value: Written

    @property
    def fields(self) -> Json:
        """The fields of a completion that ask for the same."""
        return {"guided_json": self.value}


class SchemaGrammar(Body):
    """TGI's form of OpenAI's."""

    type: Literal["json_schema"]
    value: SchemaOfGrammar

    @property
    def fields(self) -> Json:
        return {"guided_json": self.value.json_schema}


class RegexGrammar(Body):
    type: Literal["regex"]
    value: Source

    @property
    def fields(self) -> Json:
        return {"guided_regex": self.value}


Grammar = Annotated[JsonGrammar | SchemaGrammar | RegexGrammar, Field(discriminator="type")]


class AdapterParameters(Body):
    """What serves a request: the base, an adapter, or several merged."""

    adapter_id: Name | None = None
    adapter_source: AdapterSource | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(None, repr=False)  # for hubs, which this server never contacts

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.adapter_id is not None and self.merged_adapters is not None:
            raise InvalidRequestError(
                "at most one of `adapter_id` or `merged_adapters` may be provided",
                param="merged_adapters",
            )
        return self


class Parameters(AdapterParameters):
    """Parameters of generation; `turbo` and `user` are this server's own, as in OpenAI's routes."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "watermark": Unsupported("remove it: no watermark is put into texts here", (False,)),
        "apply_chat_template": Unsupported("send the chat to /v1/chat/completions", (False,)),
    }

    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: Number | None = Field(None, ge=0)
    repetition_penalty: Number | None = Field(None, gt=0)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    top_k: int | None = Field(None, gt=0)
    top_p: Number | None = Field(None, gt=0, lt=1)
    typical_p: Number | None = Field(None, gt=0, lt=1)
    do_sample: bool = False
    seed: int | None = Field(None, ge=0, lt=2**64)
    max_new_tokens: int | None = Field(None, gt=0)
    ignore_eos_token: bool = False
    return_full_text: bool = False
    stop: list[Annotated[ValidText, Field(min_length=1)]] = Field(
        default=[], max_length=MAX_STOPS, fail_fast=True
    )
    truncate: int | None = Field(None, gt=0)
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = Field(None, gt=0, le=MAX_LOGPROBS)
    response_format: LoraxResponseFormat | None = None
    grammar: Grammar | None = None  # TGI's
    top_n_tokens: int = Field(0, ge=0, le=MAX_LOGPROBS)  # TGI's
    turbo: Name = AUTO
    user: str | None = None

    @property
    def sampling(self) -> bool:
        """True if tokens are sampled; LoRAX treats a temperature of exactly 1 alone as greedy."""
        if self.temperature == 0:
            return False
        filtered = (self.top_k, self.top_p, self.typical_p) != (None, None, None)
        return self.do_sample or filtered or self.temperature not in (None, 1.0)

    @property
    def alternatives(self) -> int:
        """The best tokens that are told beside each."""
        return max(self.top_n_tokens, self.return_k_alternatives or 0)

    @property
    def candidates(self) -> int:
        return 1 if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if len(self.stop) > MAX_STOP_SEQUENCES:
            raise InvalidRequestError(
                f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. "
                f"Given: {len(self.stop)}",
                param="stop",
            )
        if self.candidates > 1:
            self._check_best_of()
        return self

    def _check_best_of(self) -> None:
        asked = (self.temperature, self.top_k, self.top_p, self.typical_p)
        if not self.do_sample and asked == (None, None, None, None):
            raise InvalidRequestError(
                "you must use sampling when `best_of` is > 1", param="best_of"
            )
        if self.seed is not None:
            raise InvalidRequestError("`seed` must not be set when `best_of` > 1", param="seed")


def _not_empty(text: str) -> str:
    if not text:
        raise InvalidRequestError("`inputs` cannot be empty", param="inputs")
    return text


Inputs = Annotated[ValidText, AfterValidator(_not_empty)]


class GenerateRequest(Body):
    """Body of POST /generate and /generate_stream."""

    inputs: Inputs
    parameters: Parameters = Field(default_factory=Parameters)


class EmbedRequest(Body):
    """Body of POST /embed."""

    inputs: Inputs
    parameters: AdapterParameters = Field(default_factory=AdapterParameters)


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /, which `stream` makes one or the other."""

    stream: bool = False
