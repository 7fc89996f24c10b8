"""Settings of the server, frozen and validated; environment variables start with QUICKCHANGE_.

A bad value raises with the setting's name. The engine process gets the same object, pickled.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1024**3
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]+")
_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")


def default_database(store: str) -> str:
    """The database URL used by default: SQLite in the store's local folder."""
    return f"sqlite:///{local_folder(store) / 'quickchange.sqlite3'}"


def is_remote(store: str) -> bool:
    """True if the store is no folder."""
    return "://" in store and not store.startswith("file://")


def local_folder(store: str) -> Path:
    """The store's folder; of one elsewhere, where this machine keeps what belongs to it."""
    if store.startswith("file://"):
        return Path(unquote(urlsplit(store).path))
    if not is_remote(store):
        return Path(store)
    xdg = os.environ.get("XDG_DATA_HOME")
    data = Path(xdg) if xdg else Path.home() / ".local" / "share"
    shown = re.sub(r"[^A-Za-z0-9.-]+", "-", store.rstrip("/"))
    unique = hashlib.sha256(store.rstrip("/").encode()).hexdigest()[:8]
    return data / "quickchange" / "stores" / f"{shown[:80]}-{unique}"


def _listed(names: str | None) -> frozenset[str]:
    return frozenset(name.strip().lower() for name in (names or "").split(",") if name.strip())


def _check_origins(value: str) -> str:
    for origin in _listed(value):
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            raise ValueError(
                f"{origin!r} is no origin; write it as browsers do, https://app.example"
            )
    return value


Origins = Annotated[str, AfterValidator(_check_origins)]


def _check_pattern(pattern: str) -> str:
    if pattern.count("{name}") != 1:
        raise ValueError("must have {name} once, for the adapter's name, as in hf://OWNER/{name}")
    return pattern


AdapterPattern = Annotated[str, AfterValidator(_check_pattern)]


def _without_end(path: str) -> str:
    if _ROOT_PATH.fullmatch(bare := path.rstrip("/")) is None:
        raise ValueError(f"{path!r} is not the beginning of a path; write it as /llm or /team/llm")
    return bare


RootPath = Annotated[str, AfterValidator(_without_end)]


class Settings(BaseSettings):
    """All settings. Sizes are in bytes, times in seconds, lengths in tokens."""

    model_config = SettingsConfigDict(env_prefix="QUICKCHANGE_", frozen=True, extra="forbid")

    model: str = Field(
        description="base model: a folder in transformers' layout, a GGUF file, or a hub id"
    )
    served_model_name: str | None = Field(
        None,
        description="the base's names in requests, joined by commas; it is listed by the first",
    )
    store: Annotated[str, BeforeValidator(os.fspath)] = Field(
        description="the adapter store: a folder, or a URL (s3://BUCKET/PREFIX, gs://..., file://)"
    )
    store_cache: Path | None = Field(
        None,
        description="folder where versions of a URL's store are kept once fetched, shared by this "
        "machine's servers; default: under the user's cache folder",
    )
    store_cache_bytes: int = Field(
        20 * GIB, ge=1024, description="size of store_cache; what was used least recently goes"
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free port")
    uds: Path | None = Field(
        None, description="a Unix socket's path, to listen on it and not on host and port"
    )
    root_path: RootPath | None = Field(
        None,
        description="the beginning of its paths for clients, such as /llm, where a proxy takes it "
        "off; requests that still have it are answered too",
    )

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="the base's floats; auto: the checkpoint's own on a GPU (bfloat16 for float32) "
        "and on CPUs that multiply bfloat16, float32 elsewhere",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="processes that hold the base together, each with a GPU of its own"
    )
    quantization: Literal["none", "int8", "int8-exact", "int4"] = Field(
        "none",
        description="how the base's linears are kept, on a CPU: int8 and int4 take 8.5 and 5 bits "
        "a weight (int4 8.5 in the LM head) and quantise activations too; int8-exact takes these "
        "as they are, and is slower",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, sum the base's products in an order that no other row changes, so "
        "that a request's tokens don't depend on its batch; slower. A CPU does so anyway",
    )
    model_check: bool = Field(
        True,
        description="hold the base, once loaded, against transformers' own; off: serve it unproved",
    )
    threads: int | None = Field(None, ge=1, description="engine threads on a CPU; default: all")

    max_model_len: int | None = Field(None, ge=16, description="default: what the model allows")
    max_logprobs: int = Field(
        20,
        ge=-1,
        description="best tokens whose log-probabilities a request may ask for at each token; -1: "
        "the whole vocabulary, which requests ask for by -1",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="token rows of one engine step, which bounds how long a prefill holds up "
        "running streams; default: 192 on a CPU, 2048 on CUDA",
    )
    max_sequences: int | None = Field(
        None,
        ge=1,
        description="sequences of one engine step; default: 64 on a CPU, 256 on CUDA, and no more "
        "than half of max_batch_tokens",
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens of one KV block")
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory that may be in use, whoever uses it; what weights, "
        "adapters, graphs and scratch leave of it goes to the KV cache",
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1024,
        description="size of the KV cache and of recurrent layers' states; default: 1 GiB on a "
        "CPU, what gpu_memory_utilization leaves on CUDA",
    )
    prefix_cache: bool = Field(True, description="reuse KV blocks of equal prompt prefixes")

    adapters: bool = Field(True, description="off: no adapter can be served, no seam is put in")
    adapter_device_bytes: int | None = Field(
        None,
        ge=1024,
        description="budget of the device tier; default: 1 GiB on a CPU; on CUDA what 64 adapters "
        "of rank 16 on all linears take, but at most a quarter of what the base leaves",
    )
    max_adapter_rank: int = Field(
        64,
        ge=1,
        le=1024,
        description="on CUDA, captured graphs serve adapters up to this rank; steps with a wider "
        "one run without, which is slower",
    )
    adapter_dtype: Literal["auto", "model", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="how adapters' weights are held: model: as the base's floats; or narrower, "
        "which halves their memory and what a step reads, at the cost of their rounding; auto: "
        "bfloat16 where quantization keeps the base narrow, else as model",
    )
    extra_vocabulary: int = Field(
        0,
        ge=0,
        le=1 << 16,
        description="tokens beyond the base's own for which adapters may bring rows of embedding "
        "and LM head, rounded up to a multiple of 64; 0: adapters with added tokens are refused",
    )
    adapter_host_bytes: int = Field(2 * GIB, ge=1024, description="budget of the host tier")
    turbo: bool = Field(True, description="off: no token is drafted ahead, whatever requests ask")
    prompt_lookup: bool = Field(
        True,
        description="draft also from what followed the same tokens earlier in prompt and output; "
        "off: Turbo heads draft alone",
    )
    derived_adapters: int = Field(
        64,
        ge=1,
        description="adapters merged for requests (ties, dare) that the store keeps; the one used "
        "least recently goes first",
    )
    adapter_paths: bool | None = Field(
        None,
        description="allow adding an adapter over HTTP from a path on the server's machine; "
        "default: only where the address is loopback",
    )
    adapter_sources: str | None = Field(
        None,
        description="beginnings of URLs, joined by commas, from which adapters may be added over "
        "HTTP (hf://OWNER, s3://BUCKET/PREFIX, gs://..., oci://REGISTRY/...); default: none",
    )
    adapter_resolver: AdapterPattern | None = Field(
        None,
        description="where an adapter that a request names and the store lacks is fetched from, "
        "with {name} for its name: hf://OWNER/{name}, s3://BUCKET/{name}, a folder",
    )
    adapter_resolver_names: int = Field(
        10_000,
        ge=1,
        description="names in the store beyond which no request has another one fetched",
    )
    adapter_watch: Path | None = Field(
        None,
        description="folder whose folders are adapters, named by them: what is put there or "
        "changes is published, for those who sync files",
    )
    max_request_bytes: int = Field(
        16 * 1024**2, ge=1024, description="largest request body, adapter uploads aside"
    )
    max_upload_bytes: int = Field(
        2 * GIB, ge=1024, description="largest adapter that is uploaded or fetched"
    )

    max_queue: int = Field(256, ge=1, description="sequences in flight before 429")
    drain_seconds: float = Field(30.0, ge=0, description="on SIGTERM, time for running requests")
    max_request_deaths: int = Field(3, ge=1, description="engine deaths before a request fails")
    engine_stall_seconds: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="an engine that says nothing for so long is replaced, at least ten times its "
        "longest step as measured at its start; 0: never",
    )
    engine_start_seconds: float = Field(
        1800.0,
        gt=0,
        allow_inf_nan=False,
        description="an engine that is not ready after so long is ended; a restart has ten times "
        "what the last start took, where that is less",
    )
    metrics_adapters: int = Field(100, ge=0, description="adapter names kept as label values")
    database: str | None = Field(
        None,
        description="where experiments, keys and usage are kept: an SQLAlchemy URL, for several "
        "replicas of PostgreSQL (postgresql+psycopg://...); default: SQLite in the store's folder, "
        "or on this machine where the store is a URL",
    )
    store_responses: bool = Field(
        False,
        description="keep the responses of /v1/responses, with their input, in the database: "
        "previous_response_id, retrieving, cancelling; off: nothing of them is kept",
    )
    store_responses_seconds: float = Field(
        30 * 86_400.0,
        gt=0,
        le=1e10,
        allow_inf_nan=False,
        description="how long a stored response is kept after it was made or last continued",
    )
    store_responses_bytes: int = Field(
        256 * 1024**2,
        ge=1024,
        description="stored responses of one tenant together; beyond it the oldest go first",
    )
    recorded_requests: int = Field(
        1000,
        ge=0,
        description="requests that a recording holds, the newest, of one tenant to one adapter; 0: "
        "none is recorded, whoever asks for it",
    )
    recorded_bytes: int = Field(
        4 * 1024**2,
        ge=1024,
        description="their size: four bytes a token, and 512 a request; beyond it the oldest go",
    )
    recording_seconds: float = Field(
        1.0,
        ge=0,
        le=1e10,
        allow_inf_nan=False,
        description="least time from one request that a recording takes to the next, so that a "
        "burst does not fill it",
    )
    api_keys: bool | None = Field(
        None,
        description="ask every request for an API key; default: only where the address is not "
        "loopback",
    )
    allow_unauthenticated: bool = Field(
        False, description="listen on an address that is not loopback without asking for keys"
    )
    allowed_host: str | None = Field(
        None,
        description="names, joined by commas, by which the server is reached besides its address "
        "and localhost; where no API key protects, requests under other names are refused",
    )
    allowed_origin: Origins | None = Field(
        None,
        description="origins, joined by commas, whose web pages may use the server "
        "(https://app.example); * for all, only where the server asks for keys",
    )
    vllm_metrics: bool = Field(
        False,
        description="tell the load in /metrics by vLLM's names too, which gateways read",
    )
    genai_metrics: bool = Field(
        False,
        description="tell requests in /metrics by OpenTelemetry's names for generative AI too",
    )
    open_metrics: bool = Field(
        False,
        description="answer /metrics without an API key where the server asks for keys; its labels "
        "name tenants and adapters",
    )
    tenant_cache: bool = Field(
        False, description="tenants share no prefix-cache hits, whose timing tells of prompts"
    )
    otlp_endpoint: str | None = Field(
        None, description="where OpenTelemetry traces are sent (OTLP over HTTP); default: nowhere"
    )
    seed: int | None = Field(None, description="seed of the drawn seeds; default: from the system")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names of `served_model_name`, the first one listed; none where it is not given."""
        names = (self.served_model_name or "").split(",")
        return tuple(name.strip() for name in names if name.strip())

    @property
    def reachable(self) -> bool:
        """True if more than this machine can reach the address."""
        return self.uds is None and not is_loopback(self.host)

    @property
    def allowed_hosts(self) -> frozenset[str]:
        return _listed(self.allowed_host)

    @property
    def allowed_origins(self) -> frozenset[str]:
        return _listed(self.allowed_origin)

    @property
    def source_prefixes(self) -> frozenset[str]:
        return _listed(self.adapter_sources)

    @property
    def store_opening(self) -> tuple[str, Path | None, int]:
        """Arguments that open the store."""
        return self.store, self.store_cache, self.store_cache_bytes

    @property
    def database_url(self) -> str:
        """`database`, or SQLite in the store's local folder."""
        return default_database(self.store) if self.database is None else self.database

    @property
    def spare_tokens(self) -> int:
        """`extra_vocabulary`, where adapters are served, rounded up to keep matrices aligned."""
        return -(-self.extra_vocabulary // 64) * 64 if self.adapters else 0

    @property
    def step_sequences(self) -> int:
        """`max_sequences`, or the device's default."""
        if self.max_sequences is not None:
            return self.max_sequences
        return min({"cpu": 64, "cuda": 256}[self.device], max(1, self.batch_tokens // 2))

    @property
    def batch_tokens(self) -> int:
        """`max_batch_tokens`, or the device's default."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return {"cpu": 192, "cuda": 2048}[self.device]


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
