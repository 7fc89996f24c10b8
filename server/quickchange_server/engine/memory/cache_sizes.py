"""Sizes of a model's caches: blocks of keys and values, and rows of recurrent layers' states."""

from __future__ import annotations

from dataclasses import dataclass

from quickchange_server.config import Settings
from quickchange_server.engine.memory.budget import LEAST_CONTEXT, MemoryLine, size
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks, StateRows
from quickchange_server.model.architectures.recurrent_layers import bytes_per_state
from quickchange_server.model.forward_context import FIRST_STATE
from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.model.paged_attention import bytes_per_block

_ROWS_OF_DRAFTS = 2  # rows per sequence for which a full batch has a captured graph, and states
_TOKENS_OF_STATES_ALONE = 32768  # default context of a model that keeps no keys and values


def graph_rows(settings: Settings) -> int:
    """Rows of the largest captured graph."""
    return settings.step_sequences * (_ROWS_OF_DRAFTS if settings.turbo else 1)


@dataclass(frozen=True)
class CacheSizes:
    """What the caches hold."""

    blocks: KVBlocks
    states: StateRows | None  # None: the model has no recurrent layers
    max_model_len: int  # tokens of the longest sequence
    block_bytes: int
    state_bytes: int

    @property
    def state_rows(self) -> int:
        return 0 if self.states is None else self.states.model_rows

    def lines(self) -> list[MemoryLine]:
        """Lines of the table of memory."""
        found = []
        if self.states is not None:
            note = f"{self.states.model_rows} of {size(self.state_bytes)}"
            found.append(MemoryLine("states", self.states.model_rows * self.state_bytes, note))
        if self.block_bytes:
            tokens = self.blocks.num_blocks * self.blocks.block_size
            note = f"{tokens} tokens: {tokens // self.max_model_len} sequences of the longest, "
            note += f"{self.max_model_len}"
            found.append(MemoryLine("KV cache", self.blocks.num_blocks * self.block_bytes, note))
        return found


def cache_sizes(model: LoadedModel, settings: Settings, budget: int) -> CacheSizes:
    """The caches that `budget` bytes have room for.

    Every sequence needs one state row, and one more for each draft that is verified; a prefix is
    found again where a state was kept behind it. So states get rows for all `max_sequences`, as
    many again where drafts are made, and as many again to keep, but no more than half of the budget
    while there are keys and values to hold, in this order of importance. Blocks get the rest.
    Raises ValueError if there is no room for the states of one sequence, or if no sequence can be
    as long as the settings say.
    """
    most, with_drafts = settings.step_sequences, graph_rows(settings)
    block, state = _block_bytes(model, settings), bytes_per_state(model.recurrent)
    states = None
    if model.recurrent:
        room = (budget // 2 if block else budget) // state - FIRST_STATE
        rows = min(with_drafts, room)
        if rows < 1:
            raise ValueError(
                f"kv_cache_bytes ({budget}) has no room for the states of one sequence, {state} "
                f"bytes: give at least {state * (FIRST_STATE + 1) * (2 if block else 1)}"
            )
        states = StateRows(rows, min(most, room - rows) if settings.prefix_cache else 0)
    if block:
        num_blocks = (budget - (0 if states is None else states.model_rows * state)) // block
    else:  # blocks hold nothing: as many as all the sequences can ask for
        length = settings.max_model_len or min(model.max_positions, _TOKENS_OF_STATES_ALONE)
        num_blocks = -(-length // settings.block_size) * most
    blocks = KVBlocks(num_blocks, settings.block_size, prefix_cache=settings.prefix_cache)
    return CacheSizes(blocks, states, _context_length(model, settings, blocks), block, state)


def least_caches(model: LoadedModel, settings: Settings) -> CacheSizes:
    """Caches of one block and one state, for steps as long as any."""
    states = StateRows(1, 0) if model.recurrent else None
    length = settings.max_model_len or model.max_positions
    blocks = KVBlocks(1, settings.block_size, prefix_cache=False)
    return CacheSizes(blocks, states, length, _block_bytes(model, settings), 0)


def least_bytes(model: LoadedModel, settings: Settings) -> tuple[int, int]:
    """Bytes of caches for one sequence of a useful length, or the one that is set, and that length
    in tokens."""
    tokens = settings.max_model_len or min(model.max_positions, LEAST_CONTEXT)
    keys = -(-tokens // settings.block_size) * _block_bytes(model, settings)
    if not model.recurrent:
        return keys, tokens
    states = bytes_per_state(model.recurrent) * (FIRST_STATE + 1)
    return (2 * max(states, keys) if keys else states), tokens


def _block_bytes(model: LoadedModel, settings: Settings) -> int:
    return bytes_per_block(model.layers, settings.block_size, model.dtype)


def _context_length(model: LoadedModel, settings: Settings, blocks: KVBlocks) -> int:
    """Most tokens of one sequence. Raises ValueError if the model has fewer positions, or none."""
    most = model.max_positions
    room = blocks.num_blocks * blocks.block_size if model.layers else _TOKENS_OF_STATES_ALONE
    length = settings.max_model_len or min(most, room)
    if not 1 <= length <= most:
        raise ValueError(f"max_model_len ({length}) must be from 1 to the model's {most}")
    return length
