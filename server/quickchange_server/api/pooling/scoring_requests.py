"""Bodies of /score and /rerank: pairs of texts, in the forms of vLLM, Jina and Cohere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

from quickchange_server.api.openai.chat.chat_requests import check_content
from quickchange_server.api.openai.requests import wrong
from quickchange_server.api.pooling.pooling_requests import POOLING_UNSUPPORTED, PooledRequest
from quickchange_server.frontend.request_base import MAX_PROMPTS, Unsupported, check_text


def _text(value: Any) -> str:
    """A text: a string, Cohere's {"text"} or vLLM's {"content"} of text parts."""
    if isinstance(value, dict) and len(value) == 1:
        value = value["text"] if "text" in value else check_content(value.get("content"))
        value = "\n".join(value) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise PydanticCustomError(
            "texts", 'must be a string or {"text": "…"}: this server reads text alone'
        )
    return check_text(value)


def _texts(value: Any) -> list[str]:
    """One text, or a list of them, as a list."""
    listed = value if isinstance(value, list) else [value]
    if not 1 <= len(listed) <= MAX_PROMPTS:
        raise PydanticCustomError(
            "texts", "must be a text, or a list of 1 to {most}", {"most": MAX_PROMPTS}
        )
    return [_text(one) for one in listed]


_TEXT: JsonSchemaValue = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
    ]
}
_LIST = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS}
OneText = Annotated[SkipValidation[str], BeforeValidator(_text), WithJsonSchema(_TEXT)]
Texts = Annotated[
    SkipValidation[list[str]],
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [*_TEXT["anyOf"], _LIST]}),
]


LIMITS = ("max_tokens_per_query", "max_tokens_per_doc")  # of the first texts and of the second


class PairsRequest(PooledRequest):
    """What /score and /rerank share."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **POOLING_UNSUPPORTED,
        "chat_template_kwargs": Unsupported("write what they say into the texts", ({},)),
        "instruction": Unsupported("write it into the texts"),
        "max_chunks_per_doc": Unsupported("send the chunks as documents of their own"),
        "rank_fields": Unsupported("send the fields that count as each document's text"),
    }

    max_tokens_per_query: int = Field(0, lt=2**63, ge=-(2**63))  # 0: all
    max_tokens_per_doc: int = Field(0, lt=2**63, ge=-(2**63))

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        for name in LIMITS:
            if getattr(self, name) < 0:
                raise wrong(name, f"{name} must be a non-negative integer; give 0 for all tokens")
        return self


PAIRS = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


class ScoreRequest(PairsRequest):
    """Body of POST /score: two fields of one of the pairs, of 1 to 1, 1 to N or N to N texts."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": list(names)} for names in PAIRS]}
    )

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two fields that are given."""
        every = {name for pair in PAIRS for name in pair}
        given = {name for name in every if getattr(self, name) is not None}
        for pair in PAIRS:
            if given == set(pair):
                return pair
        known = ", ".join(" and ".join(pair) for pair in PAIRS)
        raise wrong("queries", f"give the two fields of one pair: {known}")

    @property
    def texts(self) -> tuple[Sequence[str], Sequence[str]]:
        """The texts of the first field and of the second."""
        first, second = (getattr(self, name) for name in self.names)
        return first, second

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        first, second = self.texts
        if len(first) not in (1, len(second)):
            raise wrong(
                self.names[1],
                f"Input lengths must be either 1:1, 1:N or N:N; there are {len(first)} and "
                f"{len(second)}",
            )
        return self


class RerankRequest(PairsRequest):
    """Body of POST /rerank."""

    query: OneText
    documents: Texts
    top_n: int = Field(0, ge=0, lt=2**63)  # 0: all
    return_documents: bool = True
