"""The engine's loop sleeps where there is nothing to do, and wakes for what comes due."""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from constraint_tokens import tiny_grammars
from engine_driver import make_engine, request
from turbo_models import make_turbo_models

from quickchange_server.engine.process import Waker, _serve
from quickchange_server.protocol import Constraint, Shutdown, StepReport, Submit
from quickchange_server.structured_output.compiler import Matcher
from quickchange_server.structured_output.grammar import TokenGrammars

LIMIT_SECONDS = 180.0


class SlowGrammars:
    """Compiles so slowly that the loop sleeps meanwhile."""

    def __init__(self, grammars: TokenGrammars) -> None:
        self.ends = grammars.ends
        self.fill = grammars.fill
        self._compile = grammars.compile

    def compile(self, constraint: Constraint) -> Matcher:
        time.sleep(0.3)
        return self._compile(constraint)


def constrained(request_id: str, adapter: str) -> Submit:
    plain = request(request_id, [1, 2, 3], [(adapter, 1.0)], max_tokens=3)
    return replace(plain, constraint=Constraint("regex", "[ab]{40}"))


@pytest.mark.parametrize("adapter", ["lora-a", "five"])
def test_a_constrained_request_gets_an_adapter_that_is_not_loaded(
    tmp_path: Path, adapter: str
) -> None:
    models = make_turbo_models(tmp_path / "base")
    waker = Waker()
    engine = make_engine(
        models.path,
        models.adapters.__getitem__,
        constraints=SlowGrammars(tiny_grammars()),
        on_wake=waker.wake,
        max_model_len=72,
    )
    near, far = multiprocessing.Pipe()
    loop = threading.Thread(target=_serve, args=(far, engine, waker), daemon=True)
    loop.start()
    try:
        near.send(constrained("one", adapter))
        end = time.monotonic() + LIMIT_SECONDS
        finished = False
        while not finished and near.poll(max(end - time.monotonic(), 0)):
            report = near.recv()
            if isinstance(report, StepReport):
                finished = any(delta.finish_reason == "length" for delta in report.deltas)
        assert finished, "the loop sleeps on"
    finally:
        near.send(Shutdown())
        loop.join(LIMIT_SECONDS)
        engine.close()
