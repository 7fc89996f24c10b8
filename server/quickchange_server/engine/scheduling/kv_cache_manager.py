"""Bookkeeping of what sequences keep between steps: KV blocks and states. No tensors.

A block holds the keys and values of `block_size` consecutive tokens. A full block is found again by
its content key: a hash over (composition, parent block, its tokens), so equal prefixes under the
same adapters share blocks and a reloaded adapter name never sees stale ones. A block is in exactly
one of three states: free (no content worth keeping), cached (no user, findable, evicted least
recently used first) or used (referenced by one sequence or more).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from quickchange_server.model.forward_context import FIRST_STATE


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Content key, 16 bytes, of a full block after `parent` (first block: the composition key)."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


class KVBlocks:
    """Allocator of KV blocks with a prefix cache. For the engine thread alone."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give, cached ones evicted if need be."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) if too few are left."""
        if count > self.available:
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The longest run of known blocks along `keys`; each gets a reference."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._cached.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def commit(self, block: int, key: bytes) -> None:
        """Make a full, used block findable. A second block of equal content stays private."""
        if self._prefix_cache and key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block, last one first, so that a prefix outlives its tail."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def check_integrity(self) -> None:
        """Raises AssertionError if a block is lost, in two states or under a wrong key."""
        used = {b for b, count in enumerate(self._references) if count}
        free, cached = set(self._free), set(self._cached)
        assert min(self._references, default=0) >= 0, "negative reference count"
        assert len(free) == len(self._free), "a block is free twice"
        in_states = len(used) + len(free) + len(cached)
        assert in_states == len(used | free | cached), "a block in two states"
        assert used | free | cached == set(range(self.num_blocks)), "a block is lost"
        assert cached <= set(self._key_of), "a cached block without a key"
        assert not free & set(self._key_of), "a free block with a key"
        assert {k: b for b, k in self._key_of.items()} == self._block_of, "keys disagree"


class StateRows:
    """Allocator of state rows, and the states that are kept for prompts to come.

    Rows for sequences are given and taken back; others hold states behind full blocks, found again
    by the block's content key and forgotten as cached blocks are. The two take nothing from each
    other: no sequence waits for a kept state, and drafts don't wash them out. For the engine thread
    alone.
    """

    def __init__(self, num_rows: int, num_kept: int = 0) -> None:
        """num_rows: rows that sequences can hold. num_kept: rows behind them for kept states."""
        self.num_rows = num_rows
        self._free = list(range(FIRST_STATE + num_rows - 1, FIRST_STATE - 1, -1))
        self._kept = KVBlocks(num_kept, 1)
        self._first_kept = FIRST_STATE + num_rows

    @property
    def model_rows(self) -> int:
        """Rows that the model's pool must have."""
        return self._first_kept + self._kept.num_blocks

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_rows - len(self._free)

    @property
    def held(self) -> int:
        """Rows of kept states that sequences hold."""
        return self._kept.used

    def allocate(self, count: int) -> list[int]:
        """`count` rows, or as many as are left."""
        return [self._free.pop() for _ in range(min(count, len(self._free)))]

    def release(self, rows: Sequence[int]) -> None:
        self._free += rows

    def room_to_keep(self) -> int | None:
        """A row, held by the caller, for a state that is to be kept; None if all are held."""
        rows = self._kept.allocate(1)
        return None if rows is None else self._first_kept + rows[0]

    def keep(self, row: int, key: bytes) -> None:
        """Let the state in a held row be found by `key`."""
        self._kept.commit(row - self._first_kept, key)

    def find(self, keys: Sequence[bytes]) -> tuple[int, int | None]:
        """Length of the longest run of keys whose last has a kept state, and its row, then held."""
        for count in range(len(keys), 0, -1):
            rows = self._kept.match([keys[count - 1]])
            if rows:
                return count, self._first_kept + rows[0]
        return 0, None

    def let_go(self, row: int | None) -> None:
        """Hold a kept state's row no longer; None: nothing was held."""
        if row is not None:
            self._kept.release([row - self._first_kept])

    def check_integrity(self) -> None:
        """Raises AssertionError if a row is free twice or unknown, or a kept state is lost."""
        assert len(set(self._free)) == len(self._free), "a state row is free twice"
        known = range(FIRST_STATE, FIRST_STATE + self.num_rows)
        assert set(self._free) <= set(known), "an unknown state row"
        self._kept.check_integrity()
