"""`quickchange eval` from a task file to a table, a plot and JSON, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store
from quickchange_training.evaluation import evaluation_run
from quickchange_training.evaluation.cli import app

RUNNER = CliRunner()


def evaluate(bench: Any, *options: object) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    result = RUNNER.invoke(app, [str(bench.task), "--model", str(bench.model), *map(str, options)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def store(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    added = Store(folder)
    add_adapter(added, "stored", bench.loras["second"], base_spec(str(bench.model)))
    added.alias("live", "stored@1")
    return folder


def store_bytes(store: Path, name: str) -> int:
    found = Store(store)
    return found.info(found.resolve(name).digest).size


def test_adapters_stand_side_by_side_below_the_base(
    bench: Any, store: Path, tmp_path: Path
) -> None:
    out, plot = tmp_path / "new" / "found.json", tmp_path / "new" / "found.svg"
    code, told, errors = evaluate(
        bench, "--adapter", bench.loras["first"], "--adapter", "live+lookup", "--adapter",
        "stored", "--store", store, "--concurrency", "2,1", "--json", out, "--plot", plot,
    )  # fmt: skip
    assert code == 0, errors
    header, _, *rows, _, mixed = told.strip().splitlines()
    assert "tok/s at 1 " in header
    assert "tok/s at 2 " in header
    labels = [row.split("|")[1].strip() for row in rows]
    assert labels == ["base", "first", "live+lookup", "stored"]
    found = json.loads(out.read_text())
    assert [row["label"] for row in found["rows"]] == labels
    assert found["examples"] == 3
    base, first, live, stored = found["rows"]
    assert len({base["loss"], first["loss"], live["loss"]}) == 3
    assert (live["loss"], live["scores"]) == (stored["loss"], stored["scores"])
    assert live["answers"] == stored["answers"]
    assert live["answers"] != base["answers"]
    assert base["answers"][1]["origin"] == f"{bench.task} line 2"
    assert base["scores"]["json_valid"] is not None
    assert base["acceptance"] == []
    assert all(speed["tokens_per_second"] > 0 for speed in base["speeds"])
    assert base["size"] == {"parameters": 0, "stored_bytes": 0, "device_bytes": 0}
    assert first["size"]["parameters"] < stored["size"]["parameters"]
    assert stored["size"]["stored_bytes"] == store_bytes(store, "stored")
    assert first["size"]["device_bytes"] < stored["size"]["device_bytes"]
    requests = found["mixed"]["speed"]["requests"]
    assert requests == 4 * 2
    assert "All 4 in turn, 2 at a time: " in mixed
    assert f"{requests} of {requests} answers as when alone" in mixed
    assert plot.read_text().lstrip().startswith("<?xml")


def test_sums_and_merges_stand_beside_their_parts(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    first, second = bench.loras.values()
    parts = f"{first}*0.5,{second}*0.5"
    code, _, errors = evaluate(
        bench, "--adapter", first, "--adapter", second, "--adapter", parts, "--adapter",
        f"ties({parts})", "--concurrency", 2, "--json", out,
    )  # fmt: skip
    assert code == 0, errors
    _, one, two, summed, merged = json.loads(out.read_text())["rows"]
    assert (summed["label"], merged["label"]) == (
        "first*0.5,second*0.5",
        "ties(first*0.5,second*0.5)",
    )
    assert summed["size"]["parameters"] == one["size"]["parameters"] + two["size"]["parameters"]
    assert len({row["loss"] for row in (one, two, summed, merged)}) == 4


def test_a_limit_takes_the_first_examples(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    code, _, errors = evaluate(
        bench, "--limit", 1, "--max-tokens", 2, "--concurrency", 1, "--json", out
    )
    assert code == 0, errors
    found = json.loads(out.read_text())
    assert (found["examples"], found["max_tokens"]) == (1, 2)
    assert len(found["rows"][0]["answers"]) == 1


def test_what_is_done_is_kept_when_it_is_interrupted(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    row, done = evaluation_run._Answers.row, []

    def interrupted(self: Any, *given: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(row(self, *given))
        return done[0]

    monkeypatch.setattr(evaluation_run._Answers, "row", interrupted)
    code, _, _ = evaluate(
        bench, "--adapter", bench.loras["first"], "--concurrency", 1, "--json", out
    )
    assert code != 0
    assert [row["label"] for row in json.loads(out.read_text())["rows"]] == ["base"]


def test_a_bad_line_is_named(bench: Any, tmp_path: Path) -> None:
    task = tmp_path / "bad.jsonl"
    task.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = RUNNER.invoke(app, [str(task), "--model", str(bench.model)])
    assert result.exit_code == 1
    assert "bad.jsonl line 2" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--concurrency", "few"), "--concurrency 'few'"),
        (("--density", "0"), "--density 0: "),
        (("--concurrency", "0"), "--concurrency '0'"),
        (("--plot", "figure.txt"), ".svg"),
        (("--adapter", "nobody"), "'nobody' is not a folder; give --store"),
    ],
)
def test_a_bad_option_is_refused_by_name(bench: Any, options: tuple[str, str], named: str) -> None:
    code, _, errors = evaluate(bench, *options)
    assert code == 1
    assert named in errors


def test_an_unknown_name_is_refused(bench: Any, store: Path) -> None:
    code, _, errors = evaluate(bench, "--store", store, "--adapter", "nobody")
    assert code == 1
    assert "nobody" in errors


def test_heads_are_asked_of_an_adapter_that_has_none(bench: Any) -> None:
    first, second = bench.loras.values()
    code, _, errors = evaluate(bench, "--adapter", f"{first}+{second}")
    assert code == 1
    assert "has no Turbo heads" in errors
