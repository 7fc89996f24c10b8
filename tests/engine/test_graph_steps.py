"""The engine with decode steps from graphs gives what it gives without, whatever the padding.

A graph here is the step itself, run again on the graph's static memory, so what is tested is all of
the path but the capture.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bought_drafts import every_draft_bought
from engine_driver import Driver, make_engine, request
from repeating_capture import RepeatingCapture
from text_of_pieces import text_of_pieces
from tiny_models import VOCABULARY, make_model, save_model
from torch import Tensor, nn

from quickchange_kernels import native
from quickchange_server.engine import model_runner
from quickchange_server.engine.sampler import Sampler
from quickchange_server.model.graphs.cuda_graphs import Outputs
from quickchange_server.model.graphs.recorded_steps import NativeCapture
from quickchange_server.protocol import Constraint, Drafting
from quickchange_server.structured_output.grammar import TokenGrammars
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

RANKS = {"rank-4": 4, "rank-8": 8, "rank-16": 16, "rank-24": 24}
TOKENS = 6
Asked = list[tuple[list[int], list[tuple[str, float]]]]  # prompt and adapters of each request

ASKED: Asked = [
    ([5, 6, 7], [("rank-4", 1.0)]),
    ([8, 9], []),
    ([3] * 19, [("rank-8", 0.7), ("rank-16", -0.4)]),  # two chunks of prefill
    ([1, 2, 3, 4], [("rank-16", 1.0)]),
    ([5, 6, 7], [("rank-4", 1.0)]),
]


def load(digest: str) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(RANKS[digest])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    rank = RANKS[digest]
    updates = {
        path: LowRankUpdate(
            random(rank, linear.in_features), random(linear.out_features, rank), 1.0
        )
        for path, linear in make_model("llama").named_modules()
        if isinstance(linear, nn.Linear)
    }
    return CanonicalAdapter("L", "base", updates)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base"))


class Watched:
    """An engine's answers, and the logits behind each of their tokens."""

    def __init__(self, model: Path, asked: Asked, patch: pytest.MonkeyPatch) -> None:
        self.logits: list[Tensor] = []
        draw = Sampler.draw

        def watch(sampler: Sampler, logits: Tensor, *rest: object) -> object:
            self.logits += logits.clone()
            return draw(sampler, logits, *rest)  # type: ignore[arg-type]

        with patch.context() as during:
            during.setattr(Sampler, "draw", watch)
            engine = make_engine(model, load, max_sequences=6, adapter_device_bytes=1 << 20)
            drive = Driver(engine)
            for key, (prompt, adapters) in enumerate(asked):
                engine.submit(request(str(key), prompt, adapters, max_tokens=TOKENS + key))
            drive.finish(*map(str, range(len(asked))))
            engine.close()
        self.tokens = drive.tokens
        self.steps = engine.scheduler


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> RepeatingCapture:
    """Engines made from now on run their decode steps from graphs."""
    repeating = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: repeating)
    return repeating


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_graphs_give_the_same_logits_to_the_last_bit(
    rows: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Watched(model, ASKED[:rows], monkeypatch)
    capture = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: capture)
    replayed = Watched(model, ASKED[:rows], monkeypatch)
    assert capture.replayed > len(capture.rows), "no step was replayed"
    assert replayed.tokens == plain.tokens
    # Adapters arrive when they do, so steps may hold other rows: each row must be there somewhere
    assert sorted(row.tolist() for row in replayed.logits) == sorted(
        row.tolist() for row in plain.logits
    )


def test_the_warm_up_captures_every_shape_and_serving_no_more(
    model: Path, capture: RepeatingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched(model, ASKED, monkeypatch)
    assert capture.rows == 2 * [12, 8, 4, 2, 1, 12]  # the last: the mixed steps' samples


def test_an_engine_without_turbo_captures_no_shape_for_drafts(
    model: Path, capture: RepeatingCapture
) -> None:
    make_engine(model, load, max_sequences=6, turbo=False).close()
    assert capture.rows == 2 * [6, 4, 2, 1, 6]


def test_drafts_are_verified_from_graphs_with_the_same_tokens(
    model: Path, capture: RepeatingCapture
) -> None:
    engine = make_engine(model, load)
    drive = Driver(engine)
    with every_draft_bought():
        for key, drafting in {"off": None, "on": Drafting(lookup=True)}.items():
            asked = request(key, [5, 6, 7, 5, 6, 7, 5, 6], [("rank-4", 1.0)], max_tokens=24)
            engine.submit(replace(asked, drafting=drafting))
            warmed = capture.replayed
            drive.finish(key)
            assert capture.replayed > warmed, "no step was replayed"
    engine.close()
    assert drive.tokens["on"] == drive.tokens["off"]
    assert drive.drafted["on"] > 0


def test_masks_of_one_step_leave_nothing_in_the_next_ones_logits(
    model: Path, capture: RepeatingCapture
) -> None:
    """They are applied behind the graph, in its own output memory."""
    pieces = [*(chr(ord("!") + token) for token in range(VOCABULARY - 1)), "<end>"]
    grammars = TokenGrammars.of(text_of_pieces(pieces, VOCABULARY - 1))
    engine = make_engine(model, load, grammars)
    drive = Driver(engine)
    plain = request("alone", [5, 6, 7], max_tokens=12)
    engine.submit(plain)
    drive.finish("alone")
    constraint = Constraint("regex", "[A-Z]{9}")
    engine.submit(replace(request("masked", [8, 9], max_tokens=12), constraint=constraint))
    engine.submit(replace(plain, request_id="beside"))
    warmed = capture.replayed
    drive.finish("masked", "beside")
    engine.submit(replace(plain, request_id="after"))
    drive.finish("after")
    engine.close()
    assert capture.replayed > warmed, "no step was replayed"
    said = "".join(pieces[token] for token in drive.tokens["masked"])
    assert re.fullmatch("[A-Z]{9}", said)
    assert drive.tokens["beside"] == drive.tokens["after"] == drive.tokens["alone"]


def test_steps_with_a_wider_adapter_run_without_graphs_and_cost_no_capture(
    model: Path, capture: RepeatingCapture
) -> None:
    tokens: list[list[int]] = []
    for rank in (8, 24):
        engine = make_engine(model, load, max_adapter_rank=rank, turbo=False)
        captured = list(capture.rows)
        drive = Driver(engine)
        for key in ("rank-8", "rank-24", "rank-8 again"):
            warmed = capture.replayed
            asked = [(key.removesuffix(" again"), 1.0)]
            engine.submit(request(key, [5, 6, 7], asked, max_tokens=TOKENS))
            drive.finish(key)
            assert (capture.replayed > warmed) == (rank == 24 or key != "rank-24")
        engine.close()
        assert capture.rows == captured
        tokens.append([*drive.tokens["rank-8"], *drive.tokens["rank-24"]])
    assert tokens[0] == tokens[1]


def test_chunks_of_prompts_run_from_graphs_unless_their_rows_are_read(
    model: Path, capture: RepeatingCapture
) -> None:
    engine = make_engine(model, load)
    drive = Driver(engine)
    warmed = capture.replayed
    engine.submit(request("0", list(range(19)), max_tokens=1))
    drive.finish("0")
    assert capture.replayed == warmed + 2, "two chunks of 16 and 3 rows"
    engine.submit(request("1", list(range(20, 32)), max_tokens=0, prompt_logprobs=1))
    drive.finish("1")
    engine.close()
    assert capture.replayed == warmed + 2


def test_sampling_at_every_parameter_gives_the_tokens_of_a_run_without_graphs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows are drawn in the graph, some need edits, log-probabilities or both behind it."""
    asked: dict[str, dict[str, Any]] = {
        "greedy": {},
        "drawn": {"temperature": 0.9, "seed": 5},
        "filtered": {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 6},
        "typical": {"temperature": 1.0, "typical_p": 0.7, "seed": 7},
        "penalised": {"temperature": 0.8, "frequency_penalty": 1.0, "seed": 8},
        "biased": {"logit_bias": {3: 5.0}, "logprobs": 2},
        "told": {"temperature": 0.7, "logprobs": 3, "seed": 9},
    }

    def answers(names: tuple[str, ...]) -> dict[str, object]:
        engine = make_engine(model, load)
        drive = Driver(engine)
        for name in names:
            prompt = [list(asked).index(name) + 1, 2, 3]
            engine.submit(request(name, prompt, [("rank-8", 0.5)], max_tokens=8, **asked[name]))
        drive.finish(*names)
        engine.close()
        return {name: (drive.tokens[name], drive.logprobs[name]) for name in names}

    plain = {name: answers((name,))[name] for name in asked}
    capture = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: capture)
    assert answers(tuple(asked)) == plain
    assert answers(("greedy", "drawn", "filtered")).items() <= plain.items()
    assert capture.replayed > len(capture.rows), "no step was replayed"


def test_rows_are_priced_by_the_graphs_that_run_them(
    model: Path, capture: RepeatingCapture
) -> None:
    engine = make_engine(model, load, max_sequences=6)
    warmed, captured = capture.replayed, len(capture.rows)
    prices = engine._runner.price_rows(16)
    engine.close()
    rows = [rows for rows, _ in prices]
    assert rows == [1, 2, 4, 6, 8, 10, 12, 16]
    assert all(seconds > 0 for _, seconds in prices)
    graphs = [size for size in rows if size <= 12]  # a step of more decode rows has none
    assert capture.replayed == warmed + 3 * len(graphs)
    assert len(capture.rows) == captured


def test_pricing_leaves_no_recorded_plan_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[NativeCapture]] = []
    plans: list[int] = []

    class Noted(NativeCapture):
        def __init__(self) -> None:
            super().__init__()
            made.append(weakref.ref(self))

        def __call__(self, compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
            plans.append(len(made))
            return super().__call__(compute)

    assert native.ensure()
    monkeypatch.setattr(model_runner, "NativeCapture", Noted)
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: Noted())
    engine = make_engine(model, load, max_sequences=6)
    plans.clear()
    prices = engine._runner.price_rows(4)
    assert [rows for rows, _ in prices] == [1, 2, 4]
    assert plans == [len(made) - 1] * 3, "not priced by recorded plans"
    gc.collect()
    assert [each() is not None for each in made] == [False] * (len(made) - 1) + [True]
    drive = Driver(engine)
    engine.submit(request("r", [5, 6, 7]))
    drive.finish("r")
    assert plans[-1] == len(made), "a step from no plan of the new capture"
    engine.close()
