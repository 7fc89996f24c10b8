"""`quickchange train KIND` from files to a folder and a store, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from letter_model import save_letter_model
from typer.testing import CliRunner

from quickchange_store.store import Store
from quickchange_training.adapters.adapter_job import padding_apart_from
from quickchange_training.adapters.adapter_recipes import AloraRecipe
from quickchange_training.cli import app
from quickchange_training.examples import read_examples

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer has a token a letter and no chat template."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    return save_letter_model(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": chr(97 + i), "completion": chr(98 + i)}) for i in range(12)]
    file.write_text("\n".join(lines))
    return file


def train(*options: object, kind: str = "lora") -> tuple[int, str, str]:
    """Exit status, output and errors."""
    result = RUNNER.invoke(app, [kind, *map(str, options)])
    return result.exit_code, result.stdout, result.stderr


def test_an_adapter_is_trained_saved_and_published(model: Path, data: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "adapter", tmp_path / "store"
    code, told, errors = train(
        *("--model", model, "--data", data, "--eval-data", data, "--out", out),
        *("--rank", 4, "--steps", 3, "--name", "letters", "--store", store),
    )
    assert code == 0, errors
    assert '"held_out_loss"' in told
    assert Store(store).resolve("letters").version == 1
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["base"] == "tiny-llama"
    assert str(tmp_path) not in (out / "recipe.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "0"), "--rank must be more than 0"),
        (("--name", "letters"), "--store is missing"),
        (("--store", "somewhere"), "--name is missing"),
        (("--store", "s", "--name", "../up"), "../up"),
        (("--prompt-format", "chat"), "no chat template"),
        (("--max-length", "2"), "train.jsonl line 1: 3 tokens, more than 2"),
        (("--targets", "c_attn"), "--targets c_attn"),
        (("--eval-data", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_bad_input_ends_with_its_name_and_nothing_is_written(
    model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "adapter"
    code, _, errors = train("--model", model, "--data", data, "--out", out, *options)
    assert code == 1
    assert message in errors
    assert not out.exists()


KINDS = {
    "dora": (("--rank", 4), "DoRA"),
    "ia3": (("--lr", 0.1), "IA3"),
    "bottleneck": (("--placement", "pfeiffer", "--reduction-factor", 8), "bottleneck"),
    "peft": (("--type", "vera", "--peft-option", "r=8"), "LoRA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_and_published_by_the_same_options(
    model: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    out, store = tmp_path / "adapter", tmp_path / "store"
    options, published = KINDS[kind]
    code, told, errors = train(
        *("--model", model, "--data", data, "--out", out, "--steps", 2, *options),
        *("--name", "letters", "--store", store),
        kind=kind,
    )
    assert code == 0, errors
    assert json.loads(told.partition("published")[0])["parameters"] > 0
    version = Store(store).resolve("letters")
    assert Store(store).info(version.digest).kind == published
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["command"] == f"quickchange train {kind}"
    assert recipe[kind]["steps"] == 2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bottleneck", ("--reduction-factor", 0), "--reduction-factor must be more than 0"),
        ("peft", ("--type", "OFT"), "--type OFT is not trained here; choose BEFT"),
        ("peft", ("--type", "ADALORA"), "--type ADALORA is not trained here"),
        ("ia3", ("--peft-option", "r=3"), "--peft-option r: PEFT's IA3Config has no such field"),
        ("dora", ("--peft-option", "use_dora=false"), "--peft-option use_dora: it has an option"),
        ("alora", ("--invocation", "yz"), "train.jsonl line 1: the invocation [25, 26] is not in"),
        ("alora", ("--invocation", "[]"), "--invocation is empty"),
        ("alora", ("--invocation", "[2]"), "line 1: the invocation [2] is in the answer"),
    ],
)
def test_bad_options_of_a_kind_are_refused_by_name(
    model: Path, data: Path, tmp_path: Path, kind: str, options: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "adapter"
    code, _, errors = train("--model", model, "--data", data, "--out", out, *options, kind=kind)
    assert code == 1
    assert message in errors
    assert not out.exists()


def test_an_invocation_is_written_as_the_tokens_that_prompts_have(
    model: Path, data: Path, tmp_path: Path
) -> None:
    data.write_text('{"prompt": "abxy", "completion": "c"}\n' * 3)
    out = tmp_path / "adapter"
    code, _, errors = train(
        *("--model", model, "--data", data, "--out", out, "--steps", 2, "--invocation", "xy"),
        kind="alora",
    )
    assert code == 0, errors
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [24, 25]
    assert json.loads((out / "recipe.json").read_text())["alora"]["invocation"] == [24, 25]


@pytest.mark.parametrize(("invocation", "pad"), [((7, 2), 0), ((0,), 1), ((1, 0), 2)])
def test_padding_is_not_taken_for_an_invocation(invocation: tuple[int, ...], pad: int) -> None:
    assert padding_apart_from(AloraRecipe(invocation=invocation), 0) == pad


def test_a_folder_that_exists_is_refused_before_training(
    model: Path, data: Path, tmp_path: Path
) -> None:
    code, _, errors = train("--model", model, "--data", data, "--out", tmp_path)
    assert code == 1
    assert "is there already" in errors


def test_a_model_that_is_none_is_named(data: Path, tmp_path: Path) -> None:
    code, _, errors = train("--model", tmp_path, "--data", data, "--out", tmp_path / "adapter")
    assert code == 1
    assert "can't be loaded" in errors


def test_an_unknown_demo_task_is_refused_with_those_there_are(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["demo", "poetry", "--out", str(tmp_path / "adapter")])
    assert result.exit_code == 1
    assert "order-json, sql, docstring" in result.stderr


def test_demo_data_is_written_as_training_reads_it_and_never_over_a_file(tmp_path: Path) -> None:
    out = tmp_path / "orders.jsonl"
    arguments = ["demo-data", "order-json", "--out", str(out), "--count", "3"]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    examples = read_examples(out)
    assert [json.loads(example.completion).keys() for example in examples] == 3 * [
        {"customer": 0, "city": 0, "due": 0, "express": 0, "items": 0}.keys()
    ]
    again = RUNNER.invoke(app, arguments)
    assert again.exit_code == 1
    assert "is there already" in again.output
