"""`quickchange adapters …` from the first command to the last."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.cli import app
from quickchange_store.formats.turbo.turbo_directory import write_turbo_directory
from quickchange_store.store import Store


@pytest.fixture
def run(tmp_path: Path, bases: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QUICKCHANGE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("QUICKCHANGE_MODEL", str(bases("llama").folder))

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def adapter(train: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    train("llama", folder, r=4, target_modules=["q_proj"])
    return folder


def test_an_adapter_is_added_listed_shown_and_removed(run: Any, adapter: Path) -> None:
    added = run("add", "org/mine", adapter)
    assert added.exit_code == 0, added.output
    assert "org/mine@1" in added.stdout
    listed = run("list").stdout.splitlines()
    assert listed[0].split() == [
        "NAME",
        "VERSION",
        "DIGEST",
        "KIND",
        "RANK",
        "TARGETS",
        "PARAMETERS",
        "SIZE",
        "CREATED",
    ]
    assert listed[1].split()[:2] == ["org/mine", "1"]
    assert listed[1].split()[3] == "LoRA"
    assert "q_proj" in run("show", "org/mine").stdout
    assert "removed org/mine@1" in run("rm", "org/mine").stdout
    assert json.loads(run("list", "--json").stdout) == {
        "adapters": [],
        "aliases": {},
        "turbo": {},
    }


def test_json_has_what_the_table_has(run: Any, adapter: Path) -> None:
    added = json.loads(run("add", "mine", adapter, "--json").stdout)
    assert (added["name"], added["version"], added["warnings"]) == ("mine", 1, [])
    (entry,) = json.loads(run("list", "--json").stdout)["adapters"]
    assert entry["digest"] == added["digest"]
    assert (entry["ranks"], entry["targets"], entry["modules"]) == ([4], ["q_proj"], 2)
    shown = json.loads(run("show", "mine@1", "--json").stdout)
    assert Path(shown["path"]).is_file()
    assert [version["version"] for version in shown["versions"]] == [1]


def test_a_warning_goes_to_standard_error(run: Any, adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    content = {**json.loads(config.read_text()), "base_model_name_or_path": "other/base"}
    config.write_text(json.dumps(content))
    added = run("add", "mine", adapter)
    assert added.exit_code == 0
    assert "other/base" in added.stderr
    assert "other/base" not in added.stdout


def test_an_alias_is_set_moved_and_removed(run: Any, adapter: Path) -> None:
    run("add", "mine", adapter)
    assert run("alias", "prod", "mine@1").stdout == "prod -> mine@1\n"
    assert run("alias", "prod", "mine").stdout == "prod -> mine\n"
    assert run("list").stdout.splitlines()[-1].split() == ["prod", "mine", "-"]
    refused = run("rm", "mine")
    assert refused.exit_code == 1
    assert "'prod'" in refused.stderr
    assert run("unalias", "prod").exit_code == 0
    assert run("rm", "mine").exit_code == 0


def test_a_name_is_rolled_back(run: Any, adapter: Path, tmp_path: Path, train: Any) -> None:
    run("add", "mine", adapter)
    train("llama", tmp_path / "second", seed=2, r=4, target_modules=["q_proj"])
    assert "mine@2" in run("add", "mine", tmp_path / "second").stdout
    assert "serving mine@1" in run("rollback", "mine").stdout
    assert "serving mine@2" in run("rollback", "mine", "2").stdout


def test_verify_fails_where_something_is_damaged(run: Any, adapter: Path, tmp_path: Path) -> None:
    run("add", "mine", adapter)
    assert run("verify").exit_code == 0
    store = Store(tmp_path / "store")
    store.path(store.resolve("mine").digest).write_bytes(b"damaged")
    failed = run("verify")
    assert failed.exit_code == 1
    assert "mine@1" in failed.stderr
    assert json.loads(run("verify", "--json").stdout)[0]["subject"] == "mine@1"


def test_gc_says_what_it_removed(run: Any, adapter: Path) -> None:
    run("add", "mine", adapter)
    run("rm", "mine")
    assert len(json.loads(run("gc", "--min-age", "0", "--json").stdout)["versions"]) == 1
    assert "removed 0 versions" in run("gc").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "missing"),
        ("rm", "missing"),
        ("alias", "prod", "missing"),
        ("unalias", "missing"),
        ("rollback", "missing"),
        ("add", "../escape", "."),
        ("add", "mine", "/no/such/folder"),
        ("add", "mine", ".", "--model", "/no/such/model"),
    ],
)
def test_an_error_is_one_line_on_standard_error(run: Any, arguments: tuple[str, ...]) -> None:
    failed = run(*arguments)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.output
    assert failed.stdout == ""


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """Two parallel heads for the base model, in Quickchange's own folder."""
    block = DraftBlock(torch.ones(32, 32), torch.zeros(32))
    other = DraftBlock(torch.zeros(32, 32), torch.zeros(32))
    write_turbo_directory(TurboHeads((block, other), ((0,), (1,))), tmp_path / "heads", "tiny")
    return tmp_path / "heads"


def test_a_turbo_is_listed_and_shown_beside_medusa(run: Any, heads: Path) -> None:
    assert run("add", "fast", heads).exit_code == 0
    assert run("list").stdout.splitlines()[1].split()[3] == "Turbo"
    medusa, ours = 2 * (32 * 32 + 53 * 32), 2 * (32 * 32 + 32)
    shown = run("show", "fast").stdout
    assert f"{ours:,} parameters; Medusa-1 has {medusa:,} for as many heads, 2.6x" in shown
    turbo = json.loads(run("show", "fast", "--json").stdout)["turbo"]
    assert turbo["fewer_than_medusa"] == pytest.approx(medusa / ours)
    assert (turbo["heads"], turbo["sequential"], turbo["vocabulary"]) == (2, False, None)


def test_an_alias_binds_a_turbo(run: Any, adapter: Path, heads: Path) -> None:
    run("add", "mine", adapter)
    run("add", "fast", heads)
    bound = run("alias", "prod", "mine", "--turbo", "fast@1")
    assert bound.stdout == "prod -> mine, drafts with fast@1\n"
    assert run("list").stdout.splitlines()[-1].split() == ["prod", "mine", "fast@1"]
    digest = json.loads(run("show", "fast", "--json").stdout)["digest"]
    assert json.loads(run("show", "prod", "--json").stdout)["drafts_with"] == digest
    refused = run("alias", "next", "mine", "--turbo", "mine")
    assert refused.exit_code == 1
    assert "no Turbo heads" in refused.stderr


def test_what_is_exported_is_added_again_as_the_same_version(
    run: Any, adapter: Path, heads: Path, tmp_path: Path
) -> None:
    for name, folder, layout in (("mine", adapter, "peft"), ("fast", heads, "lorax")):
        run("add", name, folder)
        exported = run("export", name, tmp_path / layout, "--format", layout)
        assert exported.exit_code == 0, exported.output
        added = json.loads(run("add", name, tmp_path / layout, "--json").stdout)
        assert added["version"] == 1
    assert run("export", "mine", tmp_path / "v", "--format", "vllm").exit_code == 1


def test_gc_after_rm_says_what_it_keeps_and_until_when(run: Any, adapter: Path) -> None:
    run("add", "mine", adapter)
    run("rm", "mine")
    said = run("gc").stdout
    assert "removed 0 versions" in said
    assert "kept 1 removed versions" in said
    until = json.loads(run("gc", "--json").stdout)["waiting"]["until"]
    assert 3500 < until - time.time() <= 3600
    assert datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") in said
    assert "kept" not in run("gc", "--min-age", "0").stdout


def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    run: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("add", "mine", adapter)

    def full(*_: object, **_options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run("export", "mine", tmp_path / "out", "--format", "peft")
    [line] = result.stderr.splitlines()
    assert (result.exit_code, "No space left on device" in line, "MiB are free" in line) == (
        *(1, True, True),
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
