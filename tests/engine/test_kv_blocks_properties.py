"""KV blocks: no block is ever lost, shared by mistake or found under a stale key."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks, block_key

BLOCK_SIZE = 2


class KVBlocksMachine(RuleBasedStateMachine):
    """Users hold block lists; the model is what each held block's content must be."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = KVBlocks(8, BLOCK_SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # of committed blocks that somebody holds

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        available = self.blocks.available
        got = self.blocks.allocate(count)
        assert (got is None) == (count > available)
        if got:
            in_use = {block for blocks in self.held for block in blocks}
            assert not in_use & set(got), "handed out a block that somebody holds"
            self.held.append(got)
            for block in got:
                self.content.pop(block, None)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6), key=st.sampled_from([b"a", b"b"]))
    def match_then_fill(self, tokens: list[int], key: bytes) -> None:
        keys, parent = [], key
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            parent = block_key(parent, tokens[start : start + BLOCK_SIZE])
            keys.append(parent)
        found = self.blocks.match(keys)
        for block, expected in zip(found, keys, strict=False):
            assert self.content.setdefault(block, expected) == expected, "stale content"
        rest = self.blocks.allocate(len(keys) - len(found))
        if rest is None:
            self.blocks.release(found)
            return
        for block, block_content in zip(rest, keys[len(found) :], strict=True):
            self.content[block] = block_content
            self.blocks.commit(block, block_content)
        if keys:
            self.held.append(found + rest)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.blocks.release(self.held.pop(index))

    @invariant()
    def intact(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.used == len({b for blocks in self.held for b in blocks})


TestKVBlocks = KVBlocksMachine.TestCase
TestKVBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_cached_blocks_are_evicted_least_recently_used_first() -> None:
    blocks = KVBlocks(2, 1)
    first, second = blocks.allocate(2) or []
    blocks.commit(first, b"1")
    blocks.commit(second, b"2")
    blocks.release([first])
    blocks.release([second])
    blocks.match([b"1"])  # used again: now the more recent one
    blocks.release([first])
    assert blocks.allocate(1) == [second]
    assert blocks.match([b"1"]) == [first]


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    blocks = KVBlocks(2, 1)
    held = blocks.allocate(2) or []
    for block, key in zip(held, (b"1", b"2"), strict=True):
        blocks.commit(block, key)
    blocks.release(held)
    blocks.allocate(1)
    assert blocks.match([b"1", b"2"]) == held[:1]


def test_without_prefix_cache_nothing_is_found() -> None:
    blocks = KVBlocks(1, 1, prefix_cache=False)
    held = blocks.allocate(1) or []
    blocks.commit(held[0], b"1")
    blocks.release(held)
    assert blocks.match([b"1"]) == []
    assert blocks.cached == 0
