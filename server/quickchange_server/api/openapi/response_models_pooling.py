"""Response models of the routes that answer with vectors, scores and classes."""

from __future__ import annotations

from typing import Literal

from quickchange_server.api.openapi.response_models import ChosenVariant, ResponseModel


class PooledUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class PooledEnvelope(ResponseModel):
    """Fields that all of these answers have."""

    id: str
    model: str
    usage: PooledUsage
    quickchange: ChosenVariant | None = None


class PooledListEnvelope(PooledEnvelope):
    object: Literal["list"]
    created: int


class EmbeddingVector(ResponseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(PooledListEnvelope):
    data: list[EmbeddingVector]


class LoraxEmbedding(ResponseModel):
    """LoRAX's answer of /embed: one vector."""

    embeddings: list[float]


class PooledVector(ResponseModel):
    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PooledList(PooledListEnvelope):
    data: list[PooledVector]


class ClassifiedText(ResponseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifiedList(PooledListEnvelope):
    data: list[ClassifiedText]


class PairScore(ResponseModel):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(PooledListEnvelope):
    data: list[PairScore]


class RankedText(ResponseModel):
    text: str


class RankedDocument(ResponseModel):
    index: int
    relevance_score: float
    document: RankedText | None = None


class RankedList(PooledEnvelope):
    results: list[RankedDocument]
