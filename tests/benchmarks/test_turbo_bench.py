"""The Turbo benchmark: drafts on against off, by turns, on a server that counts its drafts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from quickchange_bench.bench_results import ClientCompletion, Load, summarise
from quickchange_bench.engine.turbo_bench import (
    Depth,
    DraftingSide,
    TurboOptions,
    TurboPair,
    TurboResult,
    count_drafts,
    measure_pairs,
    served_names,
    side_of,
    summarise_gains,
    turbo_table,
)
from quickchange_bench.engine.turbo_tasks import Ask, demo_asks
from quickchange_bench.load.server_process import free_port
from quickchange_bench.provenance import machine
from quickchange_training.demo.tasks import TASKS

STEP_SECONDS = 0.004
TOKENS = 12


@dataclass
class DraftingServer:
    """Answers with TOKENS tokens: one a step, or three where drafts are on."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    drafts_change_answers: bool = False

    async def answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        on = body["turbo"] != "off"
        text = f" {sum(body['prompt'])}" + ("!" if on and self.drafts_change_answers else "")
        size = 3 if on else 1
        for _ in range(TOKENS // size):
            await asyncio.sleep(STEP_SECONDS)
            if on:
                self.drafted += 4
                self.accepted += 2
            yield _event({"choices": [{"text": text * size, "finish_reason": None}]})
        yield _event({"choices": [{"text": "", "finish_reason": "length"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": TOKENS}})
        yield "data: [DONE]\n\n"

    def metrics(self) -> str:
        lines = []
        for what, count in (("drafted", self.drafted), ("accepted", self.accepted)):
            name = f"quickchange_speculation_{what}_tokens_total"
            lines += [f"# TYPE {name} counter"]
            for adapter, share in (("heads", 1), ("lookup", 1)):
                lines += [f'{name}{{adapter="{adapter}",depth="1"}} {float(count * share // 2)}']
        return "\n".join(lines) + "\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _app(fake: DraftingServer) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        fake.bodies.append(body)
        return StreamingResponse(fake.answer(body), media_type="text/event-stream")

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(fake.metrics())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "base"}, {"id": "sql"}, {"id": "sql-turbo"}]}

    return app


@pytest.fixture
def fake() -> Iterator[DraftingServer]:
    port = free_port()
    fake = DraftingServer(f"http://127.0.0.1:{port}")
    config = uvicorn.Config(_app(fake), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the fake server did not start"
        time.sleep(0.01)
    yield fake
    server.should_exit = True
    thread.join(timeout=20)


ASK = Ask("sql", "sql-turbo", "auto", {f"question {k}": (1, k) for k in range(5)}, TOKENS)


def options(tmp_path: Any, **changes: Any) -> TurboOptions:
    given = {"model": tmp_path, "tasks": ("sql",), "loads": (Load(1), Load(4)), "repeat": 2}
    return TurboOptions(**{**given, **changes})


def pairs_of(fake: DraftingServer, chosen: TurboOptions) -> list[TurboPair]:
    return asyncio.run(measure_pairs(chosen, fake.url, [ASK], lambda _: None))


def test_both_sides_ask_the_same_of_the_same_model(fake: DraftingServer, tmp_path: Any) -> None:
    pairs_of(fake, options(tmp_path, loads=(Load(1),), repeat=1))
    on, off = (
        [(b["model"], b["prompt"], b["max_tokens"]) for b in fake.bodies if b["turbo"] == turbo]
        for turbo in ("auto", "off")
    )
    assert sorted(on) == sorted(off)
    assert len(on) == 4 + 8  # warm-up, then the round
    assert all("ignore_eos" not in body for body in fake.bodies)


def test_rounds_go_over_all_loads_and_take_turns(fake: DraftingServer, tmp_path: Any) -> None:
    pairs = pairs_of(fake, options(tmp_path))
    assert [(p.turn, p.load.workers) for p in pairs] == [(0, 1), (0, 4), (1, 1), (1, 4)]
    measured = [body["turbo"] for body in fake.bodies[8:]]  # after the warm-up
    firsts = measured[::8][::2]
    assert firsts == ["auto", "off", "off", "auto"]


def test_drafts_are_counted_by_side_and_depth(fake: DraftingServer, tmp_path: Any) -> None:
    (pair,) = pairs_of(fake, options(tmp_path, loads=(Load(1),), repeat=1))
    assert pair.off.depths == ()
    assert pair.off.tokens_per_step == 1
    steps = 8 * TOKENS // 3
    assert pair.on.depths == (Depth(1, drafted=4 * steps, accepted=2 * steps),)
    assert pair.on.tokens_per_step == pytest.approx(3)
    assert pair.ratio is not None
    assert pair.ratio > 1.5
    assert pair.different == 0


def test_answers_that_differ_are_counted(fake: DraftingServer, tmp_path: Any) -> None:
    fake.drafts_change_answers = True
    (pair,) = pairs_of(fake, options(tmp_path, loads=(Load(1),), repeat=1))
    assert pair.different == 8


def test_depths_are_added_up_over_drafters() -> None:
    name = "quickchange_speculation_drafted_tokens_total"
    text = (
        f'{name}{{adapter="a",depth="1"}} 5.0\n{name}{{adapter="lookup",depth="1"}} 2.0\n'
        f'{name}{{adapter="a",depth="12"}} 3.0\n'
        'quickchange_speculation_accepted_tokens_total{adapter="a",depth="1"} 4.0\n'
        "quickchange_speculation_rows_total 10.0\n"
    )
    assert count_drafts(text) == {("drafted", 1): 7, ("drafted", 12): 3, ("accepted", 1): 4}


def completion(seconds: float) -> ClientCompletion:
    return ClientCompletion(0, None, 0.0, seconds, 0.5, (0.1,), 3, 10, "text")


def side(tokens_per_second: float) -> DraftingSide:
    done = [completion(10 / tokens_per_second)]
    return side_of(done, count_drafts(""), count_drafts(""))


def test_gains_are_medians_of_pairs_by_task_and_load() -> None:
    pairs = [
        TurboPair(task, Load(1), turn, side(on), side(10.0), different=turn)
        for task in ("sql", "chat")
        for turn, on in enumerate((20.0, 40.0, 30.0))
    ]
    sql, chat = summarise_gains(pairs)
    assert (sql.task, chat.task, sql.pairs) == ("sql", "chat", 3)
    assert (sql.on, sql.off) == pytest.approx((30, 10))
    assert (sql.ratio, sql.lowest, sql.highest) == pytest.approx((3, 2, 4))
    assert sql.different == 3
    assert sql.on_times["ttft_p50"] == 0.5


def test_a_load_without_a_token_is_an_error() -> None:
    failed = replace(completion(1.0), error="gone", output_tokens=0)
    nothing = DraftingSide(summarise([failed], None), None, ())
    with pytest.raises(RuntimeError, match="gone"):
        summarise_gains([TurboPair("sql", Load(1), 0, nothing, nothing, 0)])


def test_the_table_names_acceptance_and_differences() -> None:
    on = replace(side(20.0), depths=(Depth(1, 10, 9), Depth(2, 10, 5)))
    gains = summarise_gains([TurboPair("sql", Load(16), 0, on, side(10.0), different=0)])
    result = TurboResult("m", machine(), None, "", "", gains, ())
    header, _, row = (line.split("|") for line in turbo_table(result).splitlines())
    cells = dict(zip(map(str.strip, header), map(str.strip, row), strict=True))
    assert cells["on / off"] == "2.00"
    assert cells["accepted by depth"] == "0.90 0.50"
    assert cells["different"] == "0"


def test_open_loops_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="--concurrency"):
        options(tmp_path, loads=(Load(rate=2.0),))


# --- the tasks ----------------------------------------------------------------------------------


class LetterTokenizer:
    """A token a letter of the user's message."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in messages[0]["content"]]}


@pytest.fixture
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: LetterTokenizer()
    )


@pytest.mark.usefixtures("_letters")
def test_tasks_ask_held_out_prompts_of_what_is_served(fake: DraftingServer, tmp_path: Any) -> None:
    served = [*served_names(fake.url), "base-heads"]
    sql, chat = demo_asks(("sql", "chat"), tmp_path, served, "base", "base-heads", 20)
    held_out = TASKS["sql"].examples("held-out", 20, seed=0)
    assert list(sql.prompts) == [example.prompt for example in held_out]
    assert (sql.model, sql.turbo) == ("sql-turbo", "auto")
    assert (chat.model, chat.turbo) == ("base", "base-heads")
    assert len(chat.prompts) == 20
    message, ids = next(iter(chat.prompts.items()))
    assert ids == tuple(map(ord, message))


@pytest.mark.usefixtures("_letters")
def test_heads_are_named_where_no_alias_binds_them(tmp_path: Any) -> None:
    (sql,) = demo_asks(("sql",), tmp_path, ["base", "sql", "sql-heads"], "base", "", 4)
    assert (sql.model, sql.turbo) == ("sql", "sql-heads")


def test_prompts_are_repeated_where_they_do_not_suffice() -> None:
    requests = ASK.requests(7)
    assert [request.index for request in requests] == list(range(7))
    assert requests[5].prompt == requests[0].prompt


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize(
    ("task", "named"),
    [("poems", "--tasks 'poems'"), ("order-json", "neither order-json-turbo nor order-json")],
)
def test_a_task_that_can_not_be_asked_is_refused(tmp_path: Any, task: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        list(demo_asks((task,), tmp_path, ["base", "sql"], "base", "base-heads", 4))
