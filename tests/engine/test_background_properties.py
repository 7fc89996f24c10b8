"""The foreground runs as if it were alone, whatever the background has; the background runs too."""

from __future__ import annotations

from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
from engine_driver import request
from hypothesis import given, settings

from quickchange_server.adapters.manager import NoAdapters
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks
from quickchange_server.engine.scheduling.scheduler import Scheduled, Scheduler
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.protocol import Drafting, SamplingParams, Submit
from quickchange_server.spec_decode.speculator import NoSpeculation

BLOCK_SIZE, MAX_BATCH_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN = 4, 16, 4, 32


class RoomForTwo:
    """Adapters of which two find room at a time, given to the oldest claims first."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[str]] = {}
        self.held: dict[str, list[str]] = {}

    def claim(self, key: str, digests: list[str]) -> None:
        self.waiting[key] = digests

    def ready(self, key: str) -> Mapping[str, int] | None:
        if key in self.waiting and all(self._fits(d) for d in self.waiting[key]):
            self.held[key] = self.waiting.pop(key)
        return {d: ord(d) for d in self.held[key]} if key in self.held else None

    def failed(self, key: str) -> str | None:
        return None if key in self.waiting or key in self.held else "no claim"

    def prompt(self, _digest: str) -> None:
        """The adapters have no virtual tokens."""

    def release(self, key: str) -> None:
        self.waiting.pop(key, None)
        self.held.pop(key, None)

    def _fits(self, digest: str) -> bool:
        return len({digest, *(d for digests in self.held.values() for d in digests)}) <= 2


def scheduler(claims: RoomForTwo | None = None, blocks: int = 8) -> Scheduler:
    return Scheduler(
        # Cached prefixes are what the background may take from the foreground, and give to it.
        KVBlocks(blocks, BLOCK_SIZE, prefix_cache=False),
        claims or NoAdapters(),
        NoSpeculation(),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=MAX_SEQUENCES,
        max_model_len=MAX_MODEL_LEN,
    )


def sequence(
    name: str, prompt: int, new: int, adapter: str = "", *, background: bool = False
) -> Sequence:
    adapters = [(adapter, 1.0)] if adapter else []
    submit = request(name, [1] * prompt, adapters, background=background, max_tokens=new)
    return Sequence(submit, arrival=0.0)


def step(at: Scheduler) -> list[Scheduled]:
    """One step in which every sequence that samples gets a token."""
    plan = at.schedule(now=0.0)
    rows = sum(item.rows for item in plan)
    assert rows <= MAX_BATCH_TOKENS
    at.launched(plan)
    for item in plan:
        at.settled(item, [1] if item.samples else [])
    at.check_integrity()
    return plan


def foreground_rows(plan: list[Scheduled]) -> list[tuple[str, int, int]]:
    return sorted(
        (item.sequence.request_id, item.first + item.count, item.count)
        for item in plan
        if not item.sequence.request.background
    )


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.booleans(),  # in the background
        st.integers(1, 20),  # tokens of its prompt
        st.integers(1, 12),  # new tokens
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS)
def test_the_foreground_is_scheduled_as_if_it_were_alone(
    requests: list[tuple[int, bool, int, int]],
) -> None:
    together, alone = scheduler(), scheduler()
    for index, (steps, background, prompt, new) in enumerate(requests):
        for _ in range(steps):
            assert foreground_rows(step(together)) == foreground_rows(step(alone))
        together.add(sequence(str(index), prompt, new, background=background))
        if not background:
            alone.add(sequence(str(index), prompt, new))
    while len(alone):
        assert foreground_rows(step(together)) == foreground_rows(step(alone))
    for _ in range(1000):
        if not len(together):
            return
        assert step(together), "the background stands still while nobody else runs"
    raise AssertionError("the background never ended")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), st.integers(1, 10), st.sampled_from("xyz")),
        max_size=14,
    )
)
def test_adapters_in_the_background_delay_the_foreground_by_a_step_at_most(
    requests: list[tuple[int, bool, int, str]],
) -> None:
    """And all come to their end, though only two adapters find room."""
    at = scheduler(RoomForTwo(), blocks=64)
    waited: dict[str, int] = {}
    for index, (steps, background, new, adapter) in enumerate(requests):
        for _ in range(steps):
            step(at)
        at.add(sequence(str(index), 3, new, adapter, background=background))
    for _ in range(2000):
        if not len(at):
            return
        step(at)
        if not any(not s.request.background for s in at.running):
            for s in at.foreground:
                waited[s.request_id] = waited.get(s.request_id, 0) + 1
    assert not len(at), "never ended"
    assert max(waited.values(), default=0) <= 1


def test_a_background_sequence_gives_its_place_to_the_foreground() -> None:
    at = scheduler(blocks=32)
    for index in range(MAX_SEQUENCES):
        at.add(sequence(f"behind-{index}", 2, 20, background=True))
    step(at)
    assert len(at.running) == MAX_SEQUENCES
    at.add(sequence("front", 2, 4))
    assert foreground_rows(step(at)) == [("front", 2, 2)]
    assert [s.request_id for s in at.background] == [f"behind-{MAX_SEQUENCES - 1}"]


def test_background_rows_beside_the_foreground_are_an_eighth_of_the_budget_at_most() -> None:
    at = scheduler(blocks=32)
    at.add(sequence("front", 1, 12))
    step(at)
    at.add(sequence("behind", 14, 4, background=True))
    counts = [{i.sequence.request_id: i.count for i in step(at)} for _ in range(3)]
    assert counts == [{"front": 1, "behind": MAX_BATCH_TOKENS // 8}] * 3


def test_alone_the_background_has_the_whole_budget() -> None:
    at = scheduler(blocks=32)
    for index in range(3):
        at.add(sequence(str(index), 9, 4, background=True))
    assert sum(item.count for item in step(at)) == MAX_BATCH_TOKENS


def test_a_waiting_background_sequence_claims_no_adapter_while_the_foreground_waits() -> None:
    claims = RoomForTwo()
    at = scheduler(claims, blocks=64)
    claims.held["elsewhere"] = ["x", "y"]
    at.add(sequence("behind", 2, 4, "z", background=True))
    step(at)
    assert "behind" in claims.waiting
    at.add(sequence("front", 2, 4, "w"))
    step(at)
    assert list(claims.waiting) == ["front"]
    claims.held["elsewhere"] = ["x"]
    assert foreground_rows(step(at)) == [("front", 2, 2)]


def test_adapters_of_a_running_background_sequence_are_given_back_to_who_waits() -> None:
    claims = RoomForTwo()
    at = scheduler(claims, blocks=64)
    for name in "xy":
        at.add(sequence(name, 2, 8, name, background=True))
    step(at)
    assert set(claims.held) == {"x", "y"}
    at.add(sequence("front", 2, 4, "z"))
    step(at)
    assert not claims.held
    assert at.claims_changed, "nobody would tell the tiers"
    assert foreground_rows(step(at)) == [("front", 2, 2)]


@pytest.mark.parametrize("background", [True, False])
def test_only_the_foreground_drafts(background: bool) -> None:
    submit = Submit(
        "r",
        (1, 2),
        SamplingParams(max_tokens=4),
        drafting=Drafting("heads"),
        background=background,
        seed=0,
    )
    of = Sequence(submit, arrival=0.0)
    assert of.digests == ([] if background else ["heads"])
