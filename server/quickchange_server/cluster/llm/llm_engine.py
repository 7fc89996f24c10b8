"""The engine that Ray Serve LLM asks: the application of `create_app`, called in this process.

Every request passes the application's own routes, so all that they do is done here too: names,
tools, structured output, errors. Ray's request models become JSON bodies, answers become its
response models, and events are passed on as they come.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from ray.llm._internal.common.callbacks.base import CallbackConfig
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig, LLMConfig
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorInfo,
    ErrorResponse,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
    TranscriptionRequest,
)
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from quickchange_server.api.app_state import Services
from quickchange_server.api.error_responses import from_store
from quickchange_server.cluster.llm.asgi_call import asgi_call
from quickchange_server.cluster.llm.engine_settings import engine_settings, lora_modules
from quickchange_server.cluster.llm.lora_ids import LoraCatalog, LoraIds
from quickchange_server.cluster.llm.ray_buckets import local_model, lora_bucket
from quickchange_server.cluster.llm.replica_resources import ReplicaResources, replica_resources
from quickchange_server.entrypoints.app import create_app
from quickchange_server.entrypoints.engine_start import preload
from quickchange_server.errors import QuickchangeError, SettingError
from quickchange_store.errors import StoreError
from quickchange_store.hub_access import look_for_hub

logger = logging.getLogger(__name__)

# Headers that speak of the connection to Ray's ingress, or of the body that came by it.
_OF_THE_CONNECTION = frozenset(
    {"host", "origin", "referer", "cookie", "connection", "keep-alive", "upgrade", "expect"}
    | {"transfer-encoding", "content-length", "content-type", "content-encoding", "te"}
    | {"accept-encoding", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user"}
)


class QuickchangeEngine(LLMEngine):  # type: ignore[misc]  # Ray is not typed
    """One replica's engine. `parts` replace those of `create_app`."""

    def __init__(self, llm_config: LLMConfig, **parts: Any) -> None:
        check_config(llm_config)
        self._config = llm_config
        self._parts = parts
        self._open = AsyncExitStack()
        self._app: FastAPI | None = None
        self._ids: LoraIds | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._running = 0
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Start the application and wait for its engine. Raises QuickchangeError."""
        try:
            await self._start()
        except BaseException:
            await self._open.aclose()
            raise

    async def _start(self) -> None:
        config = self._config
        store = self._open.enter_context(
            tempfile.TemporaryDirectory(prefix="quickchange-store-", ignore_cleanup_errors=True)
        )
        model = await asyncio.to_thread(local_model, config)
        settings = engine_settings(
            config.engine_kwargs,
            model=model,
            model_id=config.model_id,
            device=resources_of(config).device,
            threads=resources_of(config).threads,
            store=Path(store),
        )
        await asyncio.to_thread(look_for_hub, model)
        if settings.device == "cpu" and not self._parts:
            preload()
        app = await asyncio.to_thread(create_app, settings, **self._parts)
        await self._open.enter_async_context(app.router.lifespan_context(app))
        services: Services = app.state.services
        bucket = lora_bucket(config)
        fetch = None if bucket is None else bucket.fetch
        self._ids = LoraIds(config.model_id, services.store, services.imports, fetch)
        catalog = LoraCatalog(
            services.store,
            self._ids,
            adapters=settings.adapters,
            turbo=settings.turbo,
            lookup=settings.prompt_lookup,
        )
        app.state.services = replace(services, catalog=catalog)
        ready = await services.started
        logger.info("%s is ready; memory:\n%s", config.model_id, ready.memory)
        for digest in await self._ids.add(lora_modules(config.engine_kwargs)):
            services.client.prefetch(digest)
        self._app = app

    async def shutdown(self) -> None:
        """Drain and end the engine."""
        await self._open.aclose()

    @property
    def _services(self) -> Services:
        assert self._app is not None, "start() comes first"
        services: Services = self._app.state.services
        return services

    # --- adapters -------------------------------------------------------------------------------

    async def load_lora(self, model_id: str) -> str:
        """Import the adapter that `BASE:ADAPTER` names, once, and begin to load it.

        Raises HTTPException.
        """
        assert self._ids is not None, "start() comes first"
        try:
            digest = await self._ids.load(model_id)
        except (QuickchangeError, StoreError) as error:
            said = from_store(error) if isinstance(error, StoreError) else error
            raise HTTPException(said.status, said.message) from error
        if digest is not None:
            self._services.client.prefetch(digest)
        return model_id

    async def resolve_lora(self, lora_model: DiskMultiplexConfig) -> None:
        """Import an adapter that lies on this machine."""
        assert self._ids is not None, "start() comes first"
        adapter = lora_model.model_id.partition(":")[2] or lora_model.model_id
        await self._ids.add({adapter: lora_model.local_path})

    # --- requests -------------------------------------------------------------------------------

    async def chat(
        self, request: ChatCompletionRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[str | ChatCompletionResponse | ErrorResponse, None]:
        """Answer a chat: events, or one response."""
        path = "/v1/chat/completions"
        async for part in self._call(path, request, raw_request_info, ChatCompletionResponse):
            yield part

    async def completions(
        self, request: CompletionRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[str | CompletionResponse | ErrorResponse, None]:
        """Continue a prompt: events, or one response."""
        async for part in self._call(
            "/v1/completions", request, raw_request_info, CompletionResponse
        ):
            yield part

    async def embeddings(
        self, request: EmbeddingRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[EmbeddingResponse | ErrorResponse, None]:
        async for part in self._call(
            "/v1/embeddings", request, raw_request_info, EmbeddingResponse
        ):
            yield part

    async def tokenize(
        self, request: TokenizeRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[TokenizeResponse | ErrorResponse, None]:
        async for part in self._call("/tokenize", request, raw_request_info, TokenizeResponse):
            yield part

    async def detokenize(
        self, request: DetokenizeRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[DetokenizeResponse | ErrorResponse, None]:
        async for part in self._call("/detokenize", request, raw_request_info, DetokenizeResponse):
            yield part

    async def transcriptions(
        self,
        request: TranscriptionRequest,  # noqa: ARG002
        raw_request_info: RawRequestInfo | None = None,  # noqa: ARG002
    ) -> AsyncGenerator[ErrorResponse, None]:
        yield error_response(501, "transcriptions: Quickchange reads text alone, no audio")

    async def score(
        self, request: ScoreRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[ScoreResponse | ErrorResponse, None]:
        async for part in self._call("/score", request, raw_request_info, ScoreResponse):
            yield part

    async def _call(
        self, path: str, request: BaseModel, raw: RawRequestInfo | None, model: type[BaseModel]
    ) -> AsyncGenerator[Any, None]:
        """The route's answer to a request, as Ray Serve LLM takes it."""
        await self._resumed.wait()
        body = body_of(request)
        headers = _headers(raw, body.pop("request_id", None))
        try:
            await self._load_named(body)
        except HTTPException as error:
            yield error_response(error.status_code, str(error.detail))
            return
        self._running += 1
        try:
            content = json.dumps(body).encode()  # ASCII, as a body may have lone surrogates
            async with asgi_call(self._application, path, content, headers) as answer:
                if answer.status >= 400:
                    yield _refusal(answer.status, await answer.body())
                elif answer.streams:
                    async for part in answer.parts:
                        yield part.decode()
                else:
                    yield model.model_validate(json.loads(await answer.body()))
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _load_named(self, body: Mapping[str, Any]) -> None:
        """Import the adapters that a body's own fields name by their ids."""
        named = [body.get("turbo"), *(_ids_of(body.get("adapters")))]
        for name in named:
            if isinstance(name, str):
                await self.load_lora(name)

    @property
    def _application(self) -> FastAPI:
        assert self._app is not None, "start() comes first"
        return self._app

    # --- the replica's life ---------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raise if engines fail one after another."""
        if self._app is not None and self._services.client.state == "failed":
            raise RuntimeError("the engine has failed; the replica's log has the reason")

    def routing_stats(self) -> dict[str, Any]:
        return {"in_flight": self._services.client.in_flight} if self._app is not None else {}

    async def build_asgi_app(self) -> FastAPI:
        """The application for Ray's direct streaming, whose lifespan has begun already."""
        outer = FastAPI(openapi_url=None)
        outer.mount("/", self._application)
        return outer

    async def pause(self, mode: str = "wait", clear_cache: bool = False) -> None:
        """Hold back new requests until `resume`, and wait for the end of those that run."""
        if mode != "wait":
            raise HTTPException(400, f"mode: {mode!r} is not served; requests end by themselves")
        if clear_cache:
            await self.reset_prefix_cache()
        self._resumed.clear()
        while self._running:
            self._idle.clear()
            await self._idle.wait()

    async def resume(self) -> None:
        self._resumed.set()

    async def is_paused(self) -> bool:
        return not self._resumed.is_set()

    async def reset_prefix_cache(self) -> None:
        raise _refused(
            "reset_prefix_cache", "cached blocks are keyed by what made them; restart the replica"
        )

    async def sleep(self, **_options: Any) -> None:
        raise _refused("sleep", "scale to zero by autoscaling_config.min_replicas")

    async def wakeup(self, **_options: Any) -> None:
        raise _refused("wakeup", "the engine never sleeps")

    async def start_profile(self) -> None:
        raise _refused("start_profile", "profile `quickchange serve` instead")

    async def stop_profile(self) -> None:
        raise _refused("stop_profile", "profile `quickchange serve` instead")

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,  # noqa: ARG002
        args: tuple[Any, ...] = (),  # noqa: ARG002
        kwargs: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[Any]:
        raise _refused("collective_rpc", f"{method!r} is a method of vLLM's workers")


def resources_of(config: LLMConfig) -> ReplicaResources:
    """What a replica takes of the cluster. Raises SettingError."""
    return replica_resources(
        config.engine_kwargs,
        kind=config.accelerator_config.kind,
        accelerator_type=config.accelerator_type,
        placement=config.placement_group_config,
        actor=config.deployment_config.get("ray_actor_options") or {},
    )


def check_config(config: LLMConfig) -> None:
    """Refuse, before anything is started, a configuration that asks for something else."""
    resources = resources_of(config)
    engine_settings(
        config.engine_kwargs,
        model=config.model_id,
        model_id=config.model_id,
        device=resources.device,
        threads=resources.threads,
        store=Path("store"),
    )
    lora_modules(config.engine_kwargs)
    loading = config.model_loading_config
    if loading.tokenizer_source not in (None, loading.model_source, loading.model_id):
        raise SettingError(
            "model_loading_config.tokenizer_source: the model's own tokenizer is used; put the "
            "tokenizer into the model's folder, or remove it",
            param="tokenizer_source",
        )
    if config.callback_config != CallbackConfig():
        raise SettingError(
            "callback_config: Quickchange calls none; remove it", param="callback_config"
        )


def body_of(request: BaseModel) -> dict[str, Any]:
    """The JSON body that the client sent, of what Ray made of it."""
    body: dict[str, Any] = request.model_dump(
        mode="json", by_alias=True, exclude_unset=True, warnings=False
    )
    body = {name: value for name, value in body.items() if value is not None}
    constraint = body.get("structured_outputs")
    if isinstance(constraint, dict):  # a dataclass in vLLM, whose unset fields are there as null
        body["structured_outputs"] = {n: v for n, v in constraint.items() if v is not None}
    return body


def error_response(status: int, message: str, kind: str = "invalid_request_error") -> ErrorResponse:
    return ErrorResponse(error=ErrorInfo(message=message, type=kind, code=status))


def _refusal(status: int, body: bytes) -> ErrorResponse:
    """An error of the application's."""
    said = json.loads(body)["error"]
    info = ErrorInfo(message=said["message"], type=said["type"], param=said["param"], code=status)
    return ErrorResponse(error=info)


def _refused(what: str, remedy: str) -> HTTPException:
    return HTTPException(501, f"{what}: not served by Quickchange; {remedy}")


def _headers(raw: RawRequestInfo | None, request_id: Any) -> dict[str, str]:
    """The client's headers, and the request's id where it has one."""
    sent = {} if raw is None else raw.headers
    headers = {n: v for n, v in sent.items() if n.lower() not in _OF_THE_CONNECTION}
    return headers if request_id is None else {**headers, "x-request-id": str(request_id)}


def _ids_of(adapters: Any) -> list[Any]:
    entries = adapters if isinstance(adapters, list) else []
    return [entry.get("id") for entry in entries if isinstance(entry, dict)]
