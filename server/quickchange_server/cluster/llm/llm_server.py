"""Quickchange as `server_cls` of Ray Serve LLM's `LLMConfig`."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator
from typing import Any

import ray
from fastapi import HTTPException
from ray import cloudpickle, serve
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.llm._internal.serve.core.ingress import ingress
from ray.serve.llm import LLMServer

from quickchange_server.cluster.llm.llm_engine import (
    QuickchangeEngine,
    check_config,
    error_response,
    resources_of,
)
from quickchange_server.errors import SettingError


class QuickchangeServer(LLMServer):  # type: ignore[misc]
    """Ray's server of one model, over Quickchange's engine.

    Batches of events, request ids and the replica's life are Ray's own; adapters are imported into
    the engine's store instead of being mounted one by one.
    """

    _default_engine_cls = QuickchangeEngine

    async def _start_engine(self) -> None:
        # Ray's own also reports the model to Ray's telemetry, in vLLM's terms.
        await self.engine.start()

    def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:  # noqa: ARG002
        """Let Ray route an id to the replicas that have had it."""

        async def loaded(model_id: str) -> str:
            return model_id

        lora = self._llm_config.lora_config
        most = 1 if lora is None else lora.max_num_adapters_per_replica
        self._load_model = serve.multiplexed(max_num_models_per_replica=most)(loaded)

    async def _maybe_resolve_lora_from_multiplex(self) -> None:
        model_id = serve.get_multiplexed_model_id()
        if model_id:
            await self.engine.load_lora(model_id)  # beside others: Ray lets one at a time through
            await self._load_model(model_id)

    async def _run_request(self, request: Any, **options: Any) -> AsyncGenerator[Any, None]:
        try:
            answer: AsyncGenerator[Any, None] = await super()._run_request(request, **options)
            return answer
        except HTTPException as error:
            return _one(error_response(error.status_code, str(error.detail)))

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        """Ray Serve's options of the deployment. Raises SettingError."""
        check_config(llm_config)
        # Ray writes signatures for FastAPI onto its ingress's methods. Pickled by reference they
        # come without them to the replica, where FastAPI from 0.137 on asks for `self` in the URL.
        cloudpickle.register_pickle_by_value(ingress)
        options: dict[str, Any] = copy.deepcopy(llm_config.deployment_config)
        for name in ("placement_group_bundles", "placement_group_strategy"):
            if name in options:
                raise SettingError(
                    f"deployment_config.{name}: give placement_group_config instead", param=name
                )
        actor = options.get("ray_actor_options") or {}
        environment = {
            **ray.get_runtime_context().runtime_env,
            **actor.get("runtime_env", {}),
            **(llm_config.runtime_env or {}),
        }
        options["ray_actor_options"] = {
            **resources_of(llm_config).actor_options(actor),
            "runtime_env": environment,
        }
        return options


async def _one(item: Any) -> AsyncGenerator[Any, None]:
    yield item
