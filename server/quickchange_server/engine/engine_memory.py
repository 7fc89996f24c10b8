"""An engine's memory: its adapters' arena, its caches, and a runner that has captured its graphs.

On a device whose memory is divided, what the steps take is measured before the caches get the rest:
a first runner, on caches of one block, captures every graph and runs the largest step; then it is
dropped. The graphs of the second, on the real caches, take the same, since a graph holds addresses
of the caches and nothing of their size. Measuring costs one capture of all graphs, whose kernels
the second capture then finds compiled. Where `kv_cache_bytes` is set, it is measured all the same,
so that what does not fit is refused at the start, not by the first long prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from quickchange_server.adapters.manager import AdapterTiers, NoAdapters, PacedLoad, Residency
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.prompts.held_prompt import CacheShape, PromptShape
from quickchange_server.adapters.turbo_packing import TurboShape
from quickchange_server.config import GIB, Settings
from quickchange_server.engine.memory.budget import Parts, kv_bytes, memory_table, size
from quickchange_server.engine.memory.cache_sizes import (
    CacheSizes,
    cache_sizes,
    graph_rows,
    least_caches,
)
from quickchange_server.engine.memory.device_memory import DeviceMemory
from quickchange_server.engine.memory.footprint import (
    arena_bytes,
    held_dtype,
    memory_lines,
    wish_of,
)
from quickchange_server.engine.model_runner import MasksFor, Runner
from quickchange_server.engine.parallel.followers import Followers
from quickchange_server.engine.warm_up import StepLimits
from quickchange_server.errors import SettingError
from quickchange_server.model.loading.model_loader import LoadedModel

# Fields of models that read token ids elsewhere than in their input embedding.
_READ_IDS = ("hidden_size_per_layer_input", "num_hash_layers")
_ANOTHER = "use another kind of adapter"


@dataclass(frozen=True)
class Fitted:
    """A runner that is warm, the sizes of its caches, and the table of what takes memory."""

    runner: Runner
    caches: CacheSizes
    limits: StepLimits  # of the largest step
    table: str


class EngineMemory:
    """Memory of one engine, divided in order: its base is loaded, then adapters, then the rest."""

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        memory: DeviceMemory | None,
        followers: Followers | None = None,
    ) -> None:
        """memory: the device's, which holds the base already; None: it is not divided. followers:
        hold the other parts of the model, each on a device that is divided as this one."""
        self._model = model
        self._settings = settings
        self._memory = memory
        self._followers = followers
        self._device = torch.device(settings.device)
        self._base = 0 if memory is None else memory.in_use()

    def adapter_tiers(self, load_adapter: PacedLoad, on_wake: Callable[[], None]) -> AdapterTiers:
        """The tiers, with the arena taken. Raises SettingError for more than the device has."""
        model, settings = self._model, self._settings
        if not settings.adapters:
            return NoAdapters()
        make_pool: Callable[..., DevicePool] = DevicePool
        if self._followers is not None:
            make_pool = self._followers.pool
        pool = make_pool(
            model.groups,
            arena_bytes(model, settings, self._left()),
            held_dtype(model, settings),
            self._device,
            most_rank=settings.max_adapter_rank,
        )
        turbo = TurboShape(model.hidden, model.vocabulary)
        prompts = prompt_shape(model, settings)
        return Residency(
            pool,
            load_adapter,
            model.groups,
            turbo,
            prompts,
            settings.adapter_host_bytes,
            on_wake,
            one_memory=self._device.type == "cpu",
        )

    def fit(self, adapters: AdapterTiers, masks: MasksFor) -> Fitted:
        """The runner and its caches, as large as the settings say or the device has room for.

        Raises SettingError, with what would fit, where one sequence of a useful length does not.
        """
        settings = self._settings
        parts = None
        if self._memory is not None:
            parts = self._measured(adapters, masks, self._memory)
            self._memory.in_use()  # the first runner is given back, which lies in cycles
        if parts is None:
            budget = GIB if settings.kv_cache_bytes is None else settings.kv_cache_bytes
        else:
            budget = kv_bytes(parts, wish_of(self._model, settings))
        caches = cache_sizes(self._model, settings, budget)
        runner = self._runner(caches, adapters, masks)
        runner.warm_up()
        lines = memory_lines(self._model, settings, adapters.device_bytes, caches, parts)
        table = memory_table(lines, "" if parts is None else parts.says)
        return Fitted(runner, caches, self._limits(adapters, caches), table)

    def _left(self) -> int | None:
        """Bytes of the device that the base leaves."""
        if self._memory is None:
            return None
        return int(self._memory.total * self._settings.gpu_memory_utilization) - self._base

    def _runner(self, caches: CacheSizes, adapters: AdapterTiers, masks: MasksFor) -> Runner:
        return Runner(
            self._model,
            adapters,
            masks,
            num_blocks=caches.blocks.num_blocks,
            block_size=caches.blocks.block_size,
            most_graph_rows=graph_rows(self._settings),
            max_model_len=caches.max_model_len,
            dtype=self._model.dtype,
            device=self._device,
            state_rows=caches.state_rows,
            max_sequences=self._settings.step_sequences,
            max_batch_tokens=self._settings.batch_tokens,
            followers=self._followers,
        )

    def _limits(self, adapters: AdapterTiers, caches: CacheSizes) -> StepLimits:
        blocks = caches.blocks
        return StepLimits(
            rows=self._settings.batch_tokens,
            sequences=self._settings.step_sequences,
            context=min(caches.max_model_len, blocks.num_blocks * blocks.block_size),
            block_size=blocks.block_size,
            state_rows=0 if caches.states is None else caches.states.num_rows,
            adapters=adapters.served,
            drafts=self._settings.turbo,
            scaling=self._model.scaling,
        )

    def _measured(self, adapters: AdapterTiers, masks: MasksFor, memory: DeviceMemory) -> Parts:
        """What steps take, by a runner of its own on the smallest caches."""
        settings = self._settings
        with_adapters = memory.in_use()
        least = least_caches(self._model, settings)
        limits = replace(self._limits(adapters, least), context=least.max_model_len)
        runner = self._runner(least, adapters, masks)
        before = memory.in_use()

        def work() -> None:
            runner.warm_up()
            runner.rehearse(limits)

        try:
            most = memory.growth(work)
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"gpu_memory_utilization ({settings.gpu_memory_utilization:g}): the base takes "
                f"{size(self._base)} and adapters {size(with_adapters - self._base)} of the "
                f"device's {size(memory.total)}, and a step of {settings.batch_tokens} rows does "
                "not fit beside them. Give fewer --max-batch-tokens or --max-sequences, a smaller "
                "--adapter-device-bytes, --dtype bfloat16, or a base that is stored quantised",
                param="gpu_memory_utilization",
            ) from error
        graphs = max(memory.in_use() - before, 0)
        return Parts(
            total=memory.total,
            share=settings.gpu_memory_utilization,
            base=self._base,
            adapters=with_adapters - self._base,
            graphs=graphs,
            scratch=max(most - graphs, 0),
        )


def prompt_shape(model: LoadedModel, settings: Settings) -> PromptShape:
    """What the model takes as virtual tokens of adapters, and why where it takes none."""
    embedding: int | str = int(model.embedding.weight.shape[-1])  # type: ignore[index]
    cache = _cache_shape(model, settings)
    config: PretrainedConfig = model.module.config
    config = config.get_text_config()
    if any(getattr(config, name, 0) for name in _READ_IDS):
        embedding = f"the served model reads token ids behind its embedding; {_ANOTHER}"
    if model.scaling is not None and model.scaling.anew:
        embedding = cache = (
            "the served model computes a text anew when it outgrows its first frequencies, for "
            f"which PEFT counts no virtual tokens; {_ANOTHER}"
        )
    most = settings.max_model_len or model.max_positions
    return PromptShape(embedding, cache, most, model.dtype)


def _cache_shape(model: LoadedModel, settings: Settings) -> CacheShape | str:
    """Shape of what the cache holds of a token, or why no adapter can give it."""
    if settings.tensor_parallel > 1:
        return (
            "keys and values of adapters are not cut over GPUs; serve it with --tensor-parallel 1"
        )
    if model.recurrent:
        return f"the served model has layers whose state keys and values can't say; {_ANOTHER}"
    shapes = list(model.layers.values())
    alike = {(shape.kv_heads, shape.head_size, shape.value_size) for shape in shapes}
    sharing = any(shape.shares is not None for shape in shapes)
    heads, keys, values = next(iter(alike))
    if sharing or len(alike) > 1 or keys != values or sorted(model.layers) != [*range(len(shapes))]:
        return f"the served model's layers have caches of several shapes; {_ANOTHER}"
    return CacheShape(len(shapes), heads, keys)
