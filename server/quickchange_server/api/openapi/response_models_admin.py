"""Response models of the routes for adapters, aliases, API keys and usage.

docs/http.md says what the fields mean."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from quickchange_server.api.openapi.response_models import ReplicaCounts, ResponseModel
from quickchange_server.engine_client.remote.cluster_view import ReplicaKind
from quickchange_server.frontend.caller import Scope
from quickchange_server.protocol import Tier
from quickchange_server.tenants.key import Limits
from quickchange_store.canonical.classifier_part import ClassActivation
from quickchange_store.canonical.prompt_part import PromptForm

# --- adapters -----------------------------------------------------------------------------------


class AdapterResidency(ResponseModel):
    tier: Tier
    bytes: int
    pinned: bool
    # In a cluster alone: the tier on each engine replica that has it in memory.
    replicas: dict[str, Tier] | None = Field(None, exclude_if=lambda replicas: replicas is None)


class DraftHeadsSummary(ResponseModel):
    depth: int
    sequential: bool
    vocabulary: int | None
    own_outputs: bool
    parameters: int
    medusa_1_ratio: float | None


class AdapterVersionDocument(ResponseModel):
    version: int
    digest: str
    created: int
    turbo: DraftHeadsSummary | None
    residency: AdapterResidency


class ServedAdapter(AdapterVersionDocument):
    """The version that a name serves."""

    id: str
    object: Literal["adapter"]


class AdapterSummary(ServedAdapter):
    versions: list[int]
    aliases: list[str]


class AdapterList(ResponseModel):
    object: Literal["list"]
    data: list[AdapterSummary]


class ClassifierSummary(ResponseModel):
    labels: list[str]
    activation: ClassActivation
    parameters: int


class TokenizerSummary(ResponseModel):
    tokens: int
    rows: int
    template: bool
    content: str


class ComposedVersion(ResponseModel):
    digest: str
    weight: float
    begin: int
    end: int | None


class PromptSummary(ResponseModel):
    form: PromptForm
    tokens: int


class AdapterContents(ResponseModel):
    architecture: str
    base_name: str
    ranks: list[int]
    targets: list[str]
    modules: int
    parameters: int
    dtypes: list[str]
    size: int
    source: dict[str, Any]
    kind: str
    classifier: ClassifierSummary | None
    composition: list[ComposedVersion]
    invocation: list[int]
    prompt: PromptSummary | None
    tokenizer: TokenizerSummary | None
    base_hidden: int | None
    base_vocabulary: int | None


class AdapterDocument(ServedAdapter):
    aliases: list[str]
    current: int
    versions: list[AdapterVersionDocument]
    info: AdapterContents


class AddedAdapter(ResponseModel):
    id: str
    object: Literal["adapter"]
    version: int
    digest: str
    created: int
    warnings: list[str]


class RemovedAdapter(ResponseModel):
    id: str
    object: Literal["adapter.deleted"]
    deleted: Literal[True]
    versions: list[str]


class VersionResidency(ResponseModel):
    id: str
    version: int
    digest: str
    residency: AdapterResidency


class AliasDocument(ResponseModel):
    id: str
    object: Literal["alias"]
    target: str
    turbo: str | None


class RecordingDocument(ResponseModel):
    id: str  # the adapter's own name
    object: Literal["recording"]
    tenant: str
    since: int
    requests: int
    bytes: int


class RecordingList(ResponseModel):
    object: Literal["list"]
    data: list[RecordingDocument]


class RecordedRequestDocument(ResponseModel):
    digest: str
    base: str
    at: float
    prompt: list[int]
    output: list[int]


class RecordingContent(ResponseModel):
    id: str
    object: Literal["recording.requests"]
    tenant: str
    data: list[RecordedRequestDocument]


class EndedRecording(ResponseModel):
    id: str
    object: Literal["recording.deleted"]
    deleted: bool


class AliasList(ResponseModel):
    object: Literal["list"]
    data: list[AliasDocument]


class RemovedAlias(ResponseModel):
    id: str
    object: Literal["alias.deleted"]
    deleted: Literal[True]


# --- replicas of a cluster ----------------------------------------------------------------------


class TierUse(ResponseModel):
    adapters: int  # versions
    used_bytes: int
    capacity_bytes: int


class EngineFigures(ResponseModel):
    running: int  # sequences
    waiting: int
    kv_share: float  # of the KV blocks, in use
    step_seconds: float
    device: TierUse
    host: TierUse


class ReplicaDocument(ResponseModel):
    id: str
    object: Literal["replica"]
    kind: ReplicaKind
    node: str
    state: str
    reported: float
    engine: EngineFigures | None


class ClusterDocument(ResponseModel):
    object: Literal["cluster"]
    answered_by: str
    engines: ReplicaCounts
    pins: list[str]
    data: list[ReplicaDocument]


# --- API keys -----------------------------------------------------------------------------------


class ApiKeyDocument(ResponseModel):
    id: str
    object: Literal["api_key"]
    tenant: str
    scope: Scope
    label: str
    names: list[str]
    limits: Limits
    state: Literal["valid", "expired", "revoked"]
    created: float
    expires: float | None
    revoked: float | None
    old_secret_until: float | None


class ApiKeyWithSecret(ApiKeyDocument):
    secret: str  # shown in this answer and never again


class ApiKeyList(ResponseModel):
    object: Literal["list"]
    data: list[ApiKeyDocument]


class UsageRow(ResponseModel):
    hour: int | None = None
    tenant: str | None = None
    key: str | None = None
    adapter: str | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    failed: int


class UsageReport(ResponseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    object: Literal["list"]
    begin: int = Field(alias="from")
    to: int
    group: list[str]
    data: list[UsageRow]
