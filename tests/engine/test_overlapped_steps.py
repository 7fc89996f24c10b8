"""Steps that overlap, two in flight, give what steps one by one give, token for token.

A CPU computes a step within its launch; its results are still read a step later, through the same
code, and the next step still takes its tokens from the device's memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from bought_drafts import every_draft_bought
from constraint_tokens import tiny_grammars
from engine_driver import Driver, make_engine, request
from hypothesis import HealthCheck, given, settings
from recurrent_models import save_recurrent
from repeating_capture import RepeatingCapture
from scaled_models import save_scaled
from turbo_models import KV_BYTES, VOCABULARY, TurboModels, make_turbo_models

from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.protocol import Constraint, Delta, Drafting, Submit

MAX_LEN = 72  # tokens
SMALL_CACHE = MAX_LEN * KV_BYTES * 5 // 4  # room for one sequence of any length, and a quarter
LIMIT_SECONDS = 180.0

TOKENS = st.integers(0, VOCABULARY - 2)
# Few beginnings, so that prefixes are shared.
STEMS = st.sampled_from([(), tuple(range(1, 9)), tuple(range(1, 17)), (5, 6) * 9])
PENALTIES = {
    "repetition_penalty": st.sampled_from([0.8, 1.5]),
    "frequency_penalty": st.just(0.7),
    "presence_penalty": st.just(0.6),
}
SAMPLING = {
    "temperature": st.sampled_from([0.0, 0.7, 1.3]),
    "top_k": st.sampled_from([-1, 3]),
    "top_p": st.sampled_from([0.6, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "min_tokens": st.sampled_from([0, 3, 9]),
    "stop_token_ids": st.frozensets(TOKENS, max_size=5),
    "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-9.0, 2.0]), max_size=2),
    "logprobs": st.sampled_from([None, 0, 2]),
    "prompt_logprobs": st.sampled_from([None, None, 1]),
}
ADAPTERS = st.sampled_from(
    [(), (("lora-a", 1.0),), (("lora-b", 0.5),), (("lora-a", 0.4), ("five", -0.3))]
)
# What is in a request beside its sampling; most have nothing that has to wait for tokens.
KINDS = st.sampled_from(
    ["plain"] * 6 + ["penalties", "drafts", "heads", "constrained", "pooled", "background"]
)


@dataclass(frozen=True)
class Arrival:
    """A request, the steps before it comes, and the tokens after which it is cancelled."""

    after: int
    submit: Submit
    leaves: int | None


@st.composite
def arrivals(draw: st.DrawFn, index: int, *, plain: bool) -> Arrival:
    kind = "plain" if plain else draw(KINDS)
    sampling = draw(st.fixed_dictionaries({}, optional=SAMPLING))
    if kind == "penalties":
        sampling |= draw(st.fixed_dictionaries({}, optional=PENALTIES))
    prompt = (*draw(STEMS), *draw(st.lists(TOKENS, min_size=1, max_size=20)))
    reads = sampling.get("prompt_logprobs") is not None  # and need not generate
    least = max(sampling.get("min_tokens", 0), 0 if reads else 1)
    submit = request(
        str(index),
        prompt,
        () if plain else draw(ADAPTERS),
        seed=index,
        max_tokens=draw(st.integers(least, 24)),
        salt=draw(st.sampled_from(["", "", "salt"])),
        background=kind == "background",
        pooling=draw(st.sampled_from(["mean", "last"])) if kind == "pooled" else None,
        **sampling,
    )
    if kind == "constrained":
        submit = replace(submit, constraint=Constraint("regex", "[ab]{5,9}"))
    if kind == "drafts":
        submit = replace(submit, drafting=Drafting(lookup=True))
    if kind == "heads":
        submit = replace(submit, drafting=Drafting(draw(st.sampled_from(["two", "five"])), True))
    leaves = draw(st.sampled_from([None] * 5 + [1, 4]))
    return Arrival(draw(st.integers(0, 4)), submit, leaves)


def traffic(*, plain: bool = False) -> st.SearchStrategy[list[Arrival]]:
    """plain: without adapters, and without what has to wait for tokens."""
    return st.integers(1, 9).flatmap(
        lambda count: st.tuples(*(arrivals(index, plain=plain) for index in range(count))).map(list)
    )


class Wasted:
    """Counts the steps that hold a sequence which had ended."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: set[tuple[int, int]] = set()
        self._kept: list[Any] = []  # ids must not be given again
        self.steps: Counter[int] = Counter()

    def look(self) -> None:
        for launched in self._engine._flights:
            for item in launched.flight.plan:
                both = id(launched.flight), id(item.sequence)
                if not self._engine.scheduler.holds(item.sequence) and both not in self._seen:
                    self._seen.add(both)
                    self._kept += [launched.flight, item.sequence]
                    self.steps[id(item.sequence)] += 1


def answers(engine: Engine, come: list[Arrival]) -> dict[str, Any]:
    """All that the engine says of each request; of one that is cancelled, its first tokens."""
    drive, wasted = Driver(engine), Wasted(engine)
    deltas: dict[str, list[Delta]] = {}
    step = engine.step

    def listening() -> Any:
        report = step()
        for delta in () if report is None else report.deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        return report

    engine.step = listening  # type: ignore[method-assign]
    left: dict[str, int] = {}
    waiting = list(come)
    steps = 0
    end = time.monotonic() + LIMIT_SECONDS
    while waiting or not {a.submit.request_id for a in come} <= {*drive.last, *left}:
        assert time.monotonic() < end, "requests that never end"
        while waiting and waiting[0].after <= steps:
            steps = 0
            engine.submit(waiting.pop(0).submit)
        if not drive.step():
            time.sleep(0.001)
        steps += 1
        wasted.look()
        for one in come:
            key = one.submit.request_id
            gone = one.leaves is not None and len(drive.tokens.get(key, ())) >= one.leaves
            if gone and key not in drive.last and key not in left:
                engine.cancel(key)
                left[key] = one.leaves or 0
    while drive.step():
        wasted.look()
    assert not engine._flights
    assert engine.scheduler.blocks.used == 0
    assert max(wasted.steps.values(), default=0) <= 1
    engine.step = step  # type: ignore[method-assign]
    return {
        one.submit.request_id: said(deltas.get(one.submit.request_id, []), one.leaves)
        for one in come
    }


def said(deltas: list[Delta], leaves: int | None) -> Any:
    tokens = [token for delta in deltas for token in delta.token_ids]
    if leaves is not None and len(tokens) >= leaves:
        return tokens[:leaves]
    [last] = [delta for delta in deltas if delta.finish_reason]
    return (
        tokens,
        [scores for delta in deltas for scores in delta.logprobs],
        deltas[0].prompt_logprobs,
        last.embedding,
        last.finish_reason,
        last.error,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TurboModels:
    return make_turbo_models(tmp_path_factory.mktemp("models") / "base")


Pair = tuple[Engine, Engine]  # one step at a time, and two in flight


@pytest.fixture(scope="module", params=["room", "small cache", "graphs"])
def engines(models: TurboModels, request: pytest.FixtureRequest) -> Iterator[Pair]:
    options: dict[str, Any] = {"max_model_len": MAX_LEN, "adapter_device_bytes": 1 << 20}
    if request.param == "small cache":
        options["kv_cache_bytes"] = SMALL_CACHE
    patch = pytest.MonkeyPatch()
    if request.param == "graphs":
        capture = RepeatingCapture()
        patch.setattr(model_runner, "capture_for", lambda _device: capture)
    one, two = (
        make_engine(
            models.path, models.adapters.__getitem__, tiny_grammars(), depth=depth, **options
        )
        for depth in (1, 2)
    )
    patch.undo()
    yield one, two
    one.close()
    two.close()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(come=traffic())
def test_any_traffic_gives_the_same_in_overlapped_steps(engines: Pair, come: list[Arrival]) -> None:
    one, two = engines
    with every_draft_bought():
        assert answers(two, come) == answers(one, come)


def alike(one: Any, other: Any) -> bool:
    """True if two answers have the same tokens and reasons, and scores that differ by rounding.

    A recurrent layer's sums depend on the rows that share its call, of which an overlapped step may
    have one more.
    """
    if isinstance(one, float):
        return bool(one == pytest.approx(other, rel=1e-4, abs=1e-4))
    if isinstance(one, bytes):
        return np.allclose(np.frombuffer(one, "<f4"), np.frombuffer(other, "<f4"), atol=1e-4)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


KINDS_OF_MODELS = {
    "qwen3_5_text": save_recurrent,
    "lfm2": save_recurrent,
    "llama-dynamic": save_scaled,
    "phi3": save_scaled,
}


@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_states_and_scaled_positions_follow_tokens_in_flight(kind: str, tmp_path: Path) -> None:
    model = KINDS_OF_MODELS[kind](kind, tmp_path)
    one, two = (make_engine(model, depth=depth, max_model_len=MAX_LEN) for depth in (1, 2))

    @settings(max_examples=8, deadline=None)
    @given(come=traffic(plain=True))
    def same(come: list[Arrival]) -> None:
        overlapped, alone = answers(two, come), answers(one, come)
        assert overlapped.keys() == alone.keys()
        for key, said in overlapped.items():
            assert alike(said, alone[key])

    same()
    one.close()
    two.close()
