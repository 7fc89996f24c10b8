"""An error that belongs to one sequence ends that one, in the step; the others' tokens stay.

Faults are put in at each place where the engine handles the data of one sequence, and parameters
that no door would let in are given to the engine as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from constraint_tokens import tiny_grammars
from engine_driver import Driver, make_engine, request
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from thorough import drawn
from turbo_models import TurboModels, make_turbo_models

from quickchange_server.engine import model_inputs, model_runner, prompt_outputs
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.inputs.sample_tables import BatchTables
from quickchange_server.engine.scheduling.sequence import Reading
from quickchange_server.engine.scheduling.sequence import Sequence as EngineSequence
from quickchange_server.protocol import Constraint, Drafting, SamplingParams, Submit
from quickchange_server.structured_output.compiler import Masked, Matcher

BAD_SEED = 666
OTHERS = ("greedy", "sampled", "reading", "constrained", "pooled")


class PanicException(BaseException):
    """What a native library raises in its panic: no Exception."""


class FaultyGrammars:
    """Grammars of which one, that of "[b]{9}", has a fault."""

    def __init__(self, *, compiling: bool) -> None:
        self._grammars = tiny_grammars()
        self.ends = self._grammars.ends
        self._compiling = compiling
        self._faulty: list[Any] = []

    def compile(self, constraint: Constraint) -> Matcher:
        matcher = self._grammars.compile(constraint)
        if constraint.source == "[b]{9}":
            if self._compiling:
                raise MemoryError("no room for the grammar")
            matcher.faulty = True  # type: ignore[attr-defined]
        return matcher

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        self._grammars.fill(wanted, bits)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TurboModels:
    return make_turbo_models(tmp_path_factory.mktemp("models") / "base")


def engine_of(models: TurboModels, **options: Any) -> Engine:
    options = {"constraints": tiny_grammars(), "max_model_len": 72, **options}
    return make_engine(models.path, models.adapters.__getitem__, **options)


def others() -> list[Submit]:
    constrained = request("constrained", [1, 2, 3], max_tokens=8, stop_token_ids=[28])
    return [
        request("greedy", [1, 2, 3, 4, 5], drafts := [("lora-a", 1.0)], max_tokens=12),
        request("sampled", [4, 5, 6], seed=3, temperature=1.0, top_k=5, max_tokens=12),
        request("reading", list(range(1, 25)), prompt_logprobs=2, logprobs=1, max_tokens=6),
        replace(constrained, constraint=Constraint("regex", "[ab]{5}")),
        request("pooled", list(range(2, 27)), drafts, pooling="mean"),
    ]


def bad(**changes: Any) -> Submit:
    plain = request(
        "bad",
        list(range(3, 9)),
        [("lora-a", 0.5)],
        seed=BAD_SEED,
        temperature=1.0,
        max_tokens=12,
        prompt_logprobs=1,
        stop_token_ids=[28],
    )
    return replace(plain, drafting=Drafting(lookup=True), **changes)


def run(engine: Engine, *submits: Submit) -> Driver:
    drive = Driver(engine)
    for submit in submits:
        engine.submit(submit)
    drive.finish(*(submit.request_id for submit in submits))
    return drive


def results(drive: Driver, *names: str) -> dict[str, Any]:
    return {
        name: (
            drive.tokens[name],
            drive.last[name].finish_reason,
            drive.last[name].embedding,
            drive.first[name].prompt_logprobs,
        )
        for name in names
    }


@pytest.fixture(scope="module")
def undisturbed(models: TurboModels) -> dict[str, Any]:
    engine = engine_of(models)
    found = results(run(engine, *others()), *OTHERS)
    engine.close()
    return found


def is_bad(items: Sequence[Any]) -> bool:
    return any(item.sequence.request_id == "bad" for item in items)


def raising(
    original: Callable[..., Any], when: Callable[..., bool], error: type[BaseException]
) -> Callable[..., Any]:
    def patched(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise error("Python int too large to convert to C long")
        return original(*arguments, **options)

    return patched


def in_submit(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    add = engine.scheduler.add
    patch.setattr(engine.scheduler, "add", raising(add, lambda s: s.request_id == "bad", error))


def in_claim(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    holdings = engine.scheduler._holdings
    patch.setattr(
        holdings, "claim", raising(holdings.claim, lambda s: s.request_id == "bad", error)
    )


def in_drafts(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    drafts = engine._speculation
    patch.setattr(drafts, "buy", raising(drafts.buy, lambda plan, _: is_bad(plan), error))


def in_inputs(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine
    faulty = raising(model_inputs.step_inputs, lambda plan, *_: is_bad(plan), error)
    patch.setattr(model_runner, "step_inputs", faulty)


def in_masks(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    runner = engine._runner
    patch.setattr(runner, "_masks", raising(runner._masks, is_bad, error))


def in_tables(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine
    faulty = raising(BatchTables.of, lambda _, items: is_bad(items), error)
    patch.setattr(BatchTables, "of", faulty)


def in_scores(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine
    faulty = raising(prompt_outputs._scores, lambda item, *_: is_bad([item]), error)
    patch.setattr(prompt_outputs, "_scores", faulty)


def in_targets(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine
    faulty = raising(prompt_outputs.read_inputs, is_bad, error)
    patch.setattr(model_runner, "read_inputs", faulty)


def in_reading(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine

    def short(_: Reading, scores: Sequence[Any]) -> bool:
        return len(scores) == 5  # the bad one's alone: its prompt has six tokens

    patch.setattr(Reading, "add_scores", raising(Reading.add_scores, short, error))


def in_take(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    del engine

    def third(sequence: EngineSequence, _: int) -> bool:
        return sequence.request_id == "bad" and sequence.output_length == 2

    patch.setattr(EngineSequence, "take", raising(EngineSequence.take, third, error))


def in_delta(engine: Engine, patch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    faulty = raising(engine._delta, lambda item, *_: is_bad([item]), error)
    patch.setattr(engine, "_delta", faulty)


PLACES = (
    in_submit,
    in_claim,
    in_drafts,
    in_inputs,
    in_masks,
    in_tables,
    in_targets,
    in_scores,
    in_reading,
    in_take,
    in_delta,
)


@pytest.mark.parametrize("error", [OverflowError, PanicException])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_fault_in_one_sequence_ends_it_alone(
    place: Callable[[Engine, pytest.MonkeyPatch, type[BaseException]], None],
    error: type[BaseException],
    models: TurboModels,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(models)
    place(engine, monkeypatch, error)
    first, *rest = others()
    drive = run(engine, first, bad(), *rest)
    monkeypatch.undo()
    assert drive.last["bad"].finish_reason == "error"
    assert drive.last["bad"].error_kind == "request"
    assert f"{error.__name__}: Python int too large" in str(drive.last["bad"].error)
    assert results(drive, *OTHERS) == undisturbed
    assert results(run(engine, replace(bad(), request_id="after")), "after")["after"][1] == "length"
    assert engine.scheduler.blocks.used == 0
    engine.close()


def test_a_grammar_whose_compilation_fails_in_an_unknown_way_ends_its_sequence_alone(
    models: TurboModels, undisturbed: dict[str, Any]
) -> None:
    engine = engine_of(models, constraints=FaultyGrammars(compiling=True))
    drive = run(engine, *others(), bad(constraint=Constraint("regex", "[b]{9}")))
    assert drive.last["bad"].error_kind == "request"
    assert "MemoryError: no room for the grammar" in str(drive.last["bad"].error)
    assert results(drive, *OTHERS) == undisturbed
    engine.close()


def test_an_error_that_the_sequences_share_is_raised(
    models: TurboModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(models)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the forward pass broke")

    monkeypatch.setattr(engine._runner, "_compute", broken)
    with pytest.raises(RuntimeError, match="the forward pass broke"):
        run(engine, *others())
    monkeypatch.undo()
    engine.close()


def test_an_interrupt_is_no_fault_of_a_sequence(
    models: TurboModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(models)
    in_tables(engine, monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, bad())
    monkeypatch.undo()
    engine.close()


NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**64, 10**400, -(10**400)]
) | st.sampled_from([0.0, 1e-45, 5e-324, -1.0, 1e30, 1e308, float("inf"), float("nan")])
TOKENS = st.sampled_from([-1, 0, 5, 28, 29, 2**31, 2**63, 10**30])
FIELDS = {
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "min_tokens",
            "max_tokens",
        ),
        NUMBERS,
    ),
    "logprobs": st.sampled_from([0, 3, 29, 2**31, 2**64, 10**400]),
    "prompt_logprobs": st.sampled_from([0, 3, 29, 2**31, 2**64, 10**400]),
    "stop_token_ids": st.frozensets(TOKENS),
    "logit_bias": st.dictionaries(TOKENS, NUMBERS),
}


def forced(fields: dict[str, Any]) -> SamplingParams:
    """Parameters that were never checked."""
    params = SamplingParams(max_tokens=6)
    for name, value in fields.items():
        object.__setattr__(params, name, value)
    return params


@pytest.fixture(scope="module")
def shared(models: TurboModels) -> Engine:
    return engine_of(models)


@drawn(40, 300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries({}, optional=FIELDS),
    seed=st.sampled_from([0, 2**63, 2**64 - 1, -(2**63), 10**400]),
    output=st.sampled_from([(), (1, 2), (-5,), (2**63,), (10**30,)]),
)
def test_parameters_of_any_size_never_touch_another_sequence(
    fields: dict[str, Any],
    seed: int,
    output: tuple[int, ...],
    shared: Engine,
    undisturbed: dict[str, Any],
) -> None:
    extreme = replace(bad(), sampling=forced(fields), seed=seed, output=output)
    stamp = f"/{time.monotonic_ns()}"
    wanted = [replace(one, request_id=one.request_id + stamp) for one in (*others(), extreme)]
    drive = Driver(shared)
    for submit in wanted:
        shared.submit(submit)
    drive.finish(*(name + stamp for name in OTHERS))
    shared.cancel(f"bad{stamp}")
    while drive.step():
        pass
    found = results(drive, *(name + stamp for name in OTHERS))
    assert {name.removesuffix(stamp): one for name, one in found.items()} == undisturbed
    assert shared.scheduler.blocks.used == 0
