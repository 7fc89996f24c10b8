"""Sizes of a model's caches and of the adapters' arena, from the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from quickchange_server.adapters.manager import AdapterTiers, NoAdapters, PacedLoad, Residency
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.turbo_packing import TurboShape
from quickchange_server.config import Settings
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks, StateRows
from quickchange_server.model.architectures.recurrent_layers import bytes_per_state
from quickchange_server.model.forward_context import FIRST_STATE
from quickchange_server.model.loading.model_dtype import torch_dtype
from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.model.paged_attention import bytes_per_block

logger = logging.getLogger(__name__)

ROWS_OF_DRAFTS = 2  # rows per sequence for which a full batch has a captured graph, and states
_TOKENS_OF_STATES_ALONE = 32768  # default context of a model that keeps no keys and values


def cache_sizes(model: LoadedModel, settings: Settings) -> tuple[StateRows | None, KVBlocks]:
    """State rows, None for a model without recurrent layers, and the KV blocks, by what
    `kv_cache_bytes` has room for.

    Every sequence needs one state row, and one more for each draft that is verified; a prefix is
    found again where a state was kept behind it. So states get rows for all `max_sequences`, as
    many again where drafts are made, and as many again to keep, but no more than half of the budget
    while there are keys and values to hold, in this order of importance. Blocks get the rest.
    Raises ValueError if there is no room for the states of one sequence.
    """
    budget, most = settings.kv_cache_bytes, settings.max_sequences
    block = bytes_per_block(model.layers, settings.block_size, model.dtype)
    if not model.recurrent:
        blocks = KVBlocks(budget // block, settings.block_size, prefix_cache=settings.prefix_cache)
        return None, blocks
    state = bytes_per_state(model.recurrent)
    room = (budget // 2 if block else budget) // state - FIRST_STATE
    rows = min(most * (ROWS_OF_DRAFTS if settings.turbo else 1), room)
    if rows < 1:
        raise ValueError(
            f"kv_cache_bytes ({budget}) has no room for the states of one sequence, {state} bytes: "
            f"give at least {state * (FIRST_STATE + 1) * (2 if block else 1)}"
        )
    states = StateRows(rows, min(most, room - rows) if settings.prefix_cache else 0)
    if block:
        num_blocks = (budget - states.model_rows * state) // block
    else:  # blocks hold nothing: as many as all the sequences can ask for
        length = settings.max_model_len or min(model.max_positions, _TOKENS_OF_STATES_ALONE)
        num_blocks = -(-length // settings.block_size) * most
    logger.info(
        "kv_cache_bytes: %d states of %d bytes for sequences, %d to keep; %d blocks of keys and "
        "values of %d bytes",
        rows,
        state,
        states.model_rows - FIRST_STATE - rows,
        num_blocks,
        block,
    )
    return states, KVBlocks(num_blocks, settings.block_size, prefix_cache=settings.prefix_cache)


def context_length(model: LoadedModel, settings: Settings, blocks: KVBlocks) -> int:
    """Most tokens of one sequence. Raises ValueError if the model has fewer positions, or none."""
    most = model.max_positions
    room = blocks.num_blocks * blocks.block_size if model.layers else _TOKENS_OF_STATES_ALONE
    length = settings.max_model_len or min(most, room)
    if not 1 <= length <= most:
        raise ValueError(f"max_model_len ({length}) must be from 1 to the model's {most}")
    return length


def adapter_tiers(
    model: LoadedModel,
    settings: Settings,
    load_adapter: PacedLoad,
    on_wake: Callable[[], None],
    make_pool: Callable[..., DevicePool] = DevicePool,
) -> AdapterTiers:
    if not settings.adapters:
        return NoAdapters()
    pool = make_pool(
        model.groups,
        settings.adapter_device_bytes,
        held_dtype(model, settings),
        device=torch.device(settings.device),
        most_rank=settings.max_adapter_rank,
    )
    turbo = TurboShape(model.hidden, model.vocabulary)
    return Residency(pool, load_adapter, model.groups, turbo, settings.adapter_host_bytes, on_wake)


def held_dtype(model: LoadedModel, settings: Settings) -> torch.dtype:
    """What adapters are held in."""
    asked = settings.adapter_dtype
    return model.dtype if asked == "model" else torch_dtype(asked)
