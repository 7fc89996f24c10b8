"""`quickchange train turbo` and `turbo-lora`, on a tiny model: from files to folder and store."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_model import save_letter_model
from typer.testing import CliRunner, Result

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store
from quickchange_training import engine_outputs
from quickchange_training.cli import app
from quickchange_training.turbo.head_maker import WantedOutputs
from quickchange_training.turbo.turbo_data import Generate, OnOutput

RUNNER = CliRunner()
QUICK = ("--steps", 3, "--max-new-tokens", 12, "--depth", 2, "--vocabulary", 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_letter_model(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": chr(97 + i)}) for i in range(20)))
    return file


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    file = tmp_path / "examples.jsonl"
    lines = [json.dumps({"prompt": chr(97 + i), "completion": "abcabc"}) for i in range(20)]
    file.write_text("\n".join(lines))
    return file


def train(command: str, model: Path, *options: object) -> Result:
    fits = ("--model", model, "--max-length", 48) if command == "turbo" else ("--model", model)
    return RUNNER.invoke(app, [command, *map(str, fits), *map(str, options)])


def stored(store: Path, name: str) -> CanonicalAdapter:
    found = Store(store)
    return found.load(found.resolve(name).digest)


def test_heads_are_trained_saved_and_published(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "heads", tmp_path / "store"
    result = train(
        "turbo",
        model,
        "--data",
        prompts,
        "--out",
        out,
        "--name",
        "drafts",
        "--store",
        store,
        *QUICK,
    )
    assert result.exit_code == 0, result.stderr
    adapter = stored(store, "drafts")
    assert not adapter.updates
    assert adapter.turbo is not None
    assert adapter.turbo.depth == 2
    assert adapter.turbo.sequential
    assert adapter.turbo.vocabulary is not None
    assert len(adapter.turbo.vocabulary) <= 9
    assert not (tmp_path / "heads.training").exists()


def test_the_report_says_what_the_heads_are_worth(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    result = train("turbo", model, "--data", prompts, "--out", tmp_path / "heads", *QUICK)
    report = json.loads(result.stdout)
    assert report["prompts"] == 19
    assert report["held_out_prompts"] == 1
    assert report["steps"] == 3
    assert len(report["held_out"]["acceptance"]) == 2
    assert 1 <= report["held_out"]["tokens_a_step"] <= 3
    assert report["parameters"] == 32 * 64 + 32  # one block for both heads
    assert report["medusa1_parameters"] == 2 * (32 * 32 + 32 + 27 * 32)
    assert "20 examples: with fewer than 2000" in result.stderr


def test_parallel_heads_are_written_in_loraxs_layout(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "heads"
    medusa = ("--kind", "parallel", "--share", "none", *QUICK, "--vocabulary", 0)
    result = train("turbo", model, "--data", prompts, "--out", out, *medusa)
    assert result.exit_code == 0, result.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["medusa_num_heads"] == 2
    assert (out / "medusa_lm_head.safetensors").is_file()
    assert str(tmp_path) not in (out / "turbo_recipe.json").read_text()


def test_a_turbo_lora_is_one_adapter_of_both_parts(
    model: Path, examples: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    options = ("--data", examples, "--out", tmp_path / "both", "--name", "both", "--store", store)
    of_turbo = ("depth=2", "steps=3", "max_new_tokens=12", "max_length=48", "vocabulary=9")
    result = train(
        "turbo-lora",
        model,
        *options,
        *("--lora", "rank=4", "--lora", "steps=3"),
        *(text for pair in of_turbo for text in ("--turbo", pair)),
    )
    assert result.exit_code == 0, result.stderr
    adapter = stored(store, "both")
    assert {update.rank for update in adapter.updates.values()} == {4}
    assert adapter.turbo is not None
    assert adapter.turbo.depth == 2
    assert "are not what the model says" in result.stderr


def test_completions_that_the_model_gives_itself_are_no_matter(
    model: Path, tmp_path: Path, outputs: dict[str, str]
) -> None:
    said = tmp_path / "said.jsonl"
    lines = [json.dumps({"prompt": p, "completion": o}) for p, o in outputs.items()]
    said.write_text("\n".join(lines))
    result = train("turbo", model, "--data", said, "--out", tmp_path / "heads", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "are not what the model says" not in result.stderr


@pytest.fixture
def outputs(model: Path, prompts: Path) -> dict[str, str]:
    """What the model says, by prompt, as text; empty ones left out."""
    letters = ["", *(chr(97 + i) for i in range(26))]
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().split("\n")]
    found: dict[str, str] = {}

    def keep(index: int, tokens: Sequence[int], _states: torch.Tensor) -> None:
        found[asked[index]] = "".join(letters[token] for token in tokens)

    wanted = WantedOutputs(str(model), None, "bfloat16", 12, frozenset({0}))
    engine_outputs.generate_for(wanted)([[letters.index(p)] for p in asked], keep)
    return {prompt: text for prompt, text in found.items() if text}


def test_an_interrupted_run_goes_on_with_the_outputs_that_it_has(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(wanted: WantedOutputs, most: int | None) -> Generate:
        make = real(wanted)

        def generate(asked: Sequence[Sequence[int]], on_output: OnOutput) -> None:
            def hear(index: int, tokens: Sequence[int], states: torch.Tensor) -> None:
                if most is not None and len(made) >= most:
                    raise KeyboardInterrupt
                made.append(index)
                on_output(index, tokens, states)

            make(asked, hear)

        return generate

    real = engine_outputs.generate_for
    whole = tmp_path / "whole"
    train("turbo", model, "--data", prompts, "--out", whole, *QUICK)
    out = tmp_path / "heads"
    monkeypatch.setattr(engine_outputs, "generate_for", lambda wanted: counted(wanted, 7))
    stopped = train("turbo", model, "--data", prompts, "--out", out, *QUICK)
    assert stopped.exit_code != 0
    assert not out.exists()
    refused = train("turbo", model, "--data", prompts, "--out", out, *QUICK)
    assert "go on from it with --resume" in refused.stderr
    monkeypatch.setattr(engine_outputs, "generate_for", lambda wanted: counted(wanted, None))
    resumed = train("turbo", model, "--data", prompts, "--out", out, *QUICK, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert len(made) == 20
    heads = "turbo_heads.safetensors"
    assert (out / heads).read_bytes() == (whole / heads).read_bytes()


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where", ["adapters.adapter_trainer.collate", "turbo.turbo_trainer.lr_share"]
)
def test_a_signal_in_a_step_saves_it_and_the_printed_command_ends_as_the_whole_run(
    model: Path,
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    received: signal.Signals,
) -> None:
    recipe = ("--lora", "steps=10", "--lora", "dropout=0.2", "--lora", "batch_size=4")
    recipe += ("--turbo", "steps=10", "--turbo", "max_new_tokens=12", "--turbo", "max_length=48")
    given = ("--data", examples, *recipe)
    whole, out = tmp_path / "whole", tmp_path / "both"
    assert train("turbo-lora", model, *given, "--out", whole).exit_code == 0
    place = f"quickchange_training.{where}"
    module, _, name = place.rpartition(".")
    real, calls = getattr(importlib.import_module(module), name), []

    def interrupting(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 6:
            signal.raise_signal(received)
        return real(*arguments)

    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    monkeypatch.setattr(sys, "argv", ["quickchange", "train", "turbo-lora", "--out", "a b"])
    monkeypatch.setattr(place, interrupting)
    try:
        stopped = train("turbo-lora", model, *given, "--out", out)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.exit_code != 0
    command = "quickchange train turbo-lora --out 'a b' --resume"
    assert f"go on with: {command}" in stopped.stderr
    assert not out.exists()
    assert len(calls) == 6  # the step that was interrupted is the last
    monkeypatch.setattr(place, real)
    resumed = train("turbo-lora", model, *given, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    for file in ("adapter_model.safetensors", "turbo_heads.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ""}', 'line 1: field "prompt" must be text'),
        ('{"question": "a"}', "line 1: has the fields"),
        ('{"prompt": "' + "a" * 40 + '"}', "line 1: the prompt has 40 tokens; 1 to 36 leave room"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ],
)
def test_a_bad_line_is_named(model: Path, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    result = train("turbo", model, "--data", file, "--out", tmp_path / "heads", *QUICK)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora", "rnk=4"), "--lora rnk: not known"),
        (("--turbo", "depth"), "--turbo 'depth': write it as KEY=VALUE"),
        (("--turbo", "depth=two"), "--turbo depth='two': int is expected"),
        (("--lora", "rank=4", "--lora", "rank=5"), "--lora rank is given twice"),
    ],
)
def test_a_bad_recipe_is_refused_by_its_key(
    model: Path, examples: Path, tmp_path: Path, options: Sequence[str], message: str
) -> None:
    result = train("turbo-lora", model, "--data", examples, "--out", tmp_path / "both", *options)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.fixture
def store(model: Path, examples: Path, prompts: Path, tmp_path: Path) -> Path:
    """A store with the LoRA `orders`, heads `drafts`, and an alias `live` of both."""
    place = tmp_path / "store"
    heads = ("--data", prompts, "--out", tmp_path / "drafts", "--name", "drafts", *QUICK)
    lora = ("--data", examples, "--out", tmp_path / "lora", "--name", "orders")
    small = ("--rank", 4, "--steps", 3)
    for command, options in (("turbo", heads), ("lora", (*lora, *small))):
        result = train(command, model, *options, "--store", place)
        assert result.exit_code == 0, result.stderr
    Store(place).alias("live", "orders", turbo="drafts")
    return place


def test_heads_are_fitted_to_an_adapter_of_the_store_and_published(
    model: Path, prompts: Path, store: Path, tmp_path: Path
) -> None:
    result = train(
        "turbo",
        model,
        *("--on", "live", "--store", store, "--name", "fitted", "--held-out", 0.2),
        *("--data", prompts, "--out", tmp_path / "fitted", *QUICK),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout[: result.stdout.rindex("}") + 1])
    assert report["started_from"] == "those of live"
    assert len(report["before"]["acceptance"]) == len(report["held_out"]["acceptance"]) == 2
    fitted = stored(store, "fitted")
    assert not fitted.updates
    assert fitted.turbo is not None
    before = stored(store, "drafts").turbo
    assert before is not None
    assert before.vocabulary is not None
    assert fitted.turbo.vocabulary is not None
    Store(store).alias("live", "orders", turbo="fitted")


def test_heads_go_on_from_those_named(
    model: Path, prompts: Path, store: Path, tmp_path: Path
) -> None:
    for start in ("drafts", tmp_path / "drafts"):
        out = tmp_path / f"from {'name' if start == 'drafts' else 'folder'}"
        given = ("--on", "orders", "--store", store, "--from", start)
        result = train("turbo", model, *given, "--data", prompts, "--out", out, *QUICK)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["started_from"] == str(start)
    one, other = (
        tmp_path / f"from {how}" / "turbo_heads.safetensors" for how in ("name", "folder")
    )
    assert one.read_bytes() == other.read_bytes()


def test_an_adapter_that_nothing_drafts_for_gets_heads_from_nothing(
    model: Path, prompts: Path, store: Path, tmp_path: Path
) -> None:
    given = ("--on", "orders", "--store", store, "--data", prompts, "--out", tmp_path / "new")
    result = train("turbo", model, *given, *QUICK)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["started_from"] is report["before"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on", "orders"), "--on: the adapter is in a store; give --store"),
        (("--on", "orders", "--adapter", "."), "--on: names the adapter, and --adapter"),
        (("--on", "drafts", "--store", "STORE"), "--on drafts: it holds heads alone"),
        (("--from", "nothing"), "--from nothing: no such folder; a name needs --store"),
        (("--from", "orders", "--store", "STORE"), "--from orders: it has no Turbo heads"),
        (("--recorded",), "--data: give a file of prompts, or --recorded"),
    ],
)
def test_an_option_of_fitting_that_cant_be_meant_is_refused(
    model: Path,
    prompts: Path,
    store: Path,
    tmp_path: Path,
    options: Sequence[str],
    message: str,
) -> None:
    given = [str(store) if option == "STORE" else option for option in options]
    out = ("--data", prompts, "--out", tmp_path / "fitted", *QUICK)
    result = train("turbo", model, *given, *out)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_states_of_given_outputs_are_those_of_making_them(model: Path, prompts: Path) -> None:
    letters = ["", *(chr(97 + i) for i in range(26))]
    asked = [
        [letters.index(json.loads(line)["prompt"])] for line in prompts.read_text().split("\n")
    ]
    made: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}
    read: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}
    wanted = WantedOutputs(str(model), None, "float32", 12, frozenset({0}))
    engine_outputs.generate_for(wanted)(
        asked, lambda index, tokens, states: made.update({index: (tuple(tokens), states)})
    )
    said = {tuple(asked[index]): tokens for index, (tokens, _) in made.items() if index % 2}
    again = WantedOutputs(str(model), None, "float32", 12, frozenset({0}), said)
    engine_outputs.generate_for(again)(
        asked, lambda index, tokens, states: read.update({index: (tuple(tokens), states)})
    )
    assert made.keys() == read.keys()
    for index, (tokens, states) in made.items():
        assert read[index][0] == tokens
        torch.testing.assert_close(read[index][1], states, rtol=1e-4, atol=1e-4)
