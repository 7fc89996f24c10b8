"""Ordinary mistakes on the command line: one line that says what to do, and nothing is made."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import make_adapter

from quickchange_server import cli
from quickchange_store.store import Store


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with a few wrong files, and no settings in the environment."""
    for name in ("QUICKCHANGE_MODEL", "QUICKCHANGE_STORE", "QUICKCHANGE_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text\n")
    Path("folder").mkdir()
    Path("broken.jsonl").write_text('{"prompt": "a"')
    Path("latin.jsonl").write_bytes(b'{"prompt": "\xe9", "completion": "b"}\n')
    Path("lines.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    store = Store("holds")
    store.add("sql", make_adapter(1.0))
    store.alias("best", "sql")
    other = sqlite3.connect("other.sqlite3")
    other.execute("CREATE TABLE a (b)")
    other.close()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def run(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit status and the last line on standard error of `quickchange COMMAND`."""
    monkeypatch.setattr(sys, "argv", ["quickchange", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    if isinstance(ended.value.code, str):  # what sys.exit(TEXT) will print
        errors += ended.value.code
        return 1, errors.strip().splitlines()[-1]
    return int(ended.value.code or 0), errors.strip().splitlines()[-1]


NO_STORE = "typo: no store here: no such folder; see the path; `quickchange adapters add` makes"
NO_DATABASE = "database: no database here: typo/quickchange.sqlite3; see the path"
MISTAKES = [
    ("adapters list --store typo", NO_STORE),
    ("adapters show a --store typo", NO_STORE),
    ("adapters rm a --store typo", NO_STORE),
    ("adapters alias a b --store typo", NO_STORE),
    ("adapters unalias a --store typo", NO_STORE),
    ("adapters rollback a --store typo", NO_STORE),
    ("adapters verify --store typo", NO_STORE),
    ("adapters gc --store typo", NO_STORE),
    ("adapters export a out --format peft --model folder --store typo", NO_STORE),
    ("adapters list --store folder", "folder: no store here; see the path"),
    ("adapters list --store file", "file: no store here: this is a file"),
    ("adapters add a folder --store new --model typo/x/y", "typo/x/y"),
    ("adapters add a folder --store new --model folder", "folder"),
    ("keys list --store typo", NO_DATABASE),
    ("keys revoke k --store typo", NO_DATABASE),
    ("keys rotate k --store typo", NO_DATABASE),
    ("keys create --tenant ! --names * --store typo", "tenant: '!' is not a valid tenant"),
    ("keys list --database nonsense", "database: not a database's URL"),
    ("keys list --database sqlite:///file", "database: sqlite:///file can't be used"),
    ("keys list --database sqlite:///other.sqlite3", "holds nothing of Quickchange's"),
    ("database prune sqlite:///typo/d.sqlite3 --before 2026-01-01", "no database here"),
    ("database move sqlite:///typo/d.sqlite3 sqlite:///new.sqlite3", "no database here"),
    ("serve --store typo --model no/such/folder --port 0", "model: there is no folder"),
    ("serve --store typo --model folder --port 0", "model: can't read"),
    ("serve --store file --model folder --port 0", "file"),
    ("train lora --data typo.jsonl --out out --model folder", "typo.jsonl"),
    ("train lora --data folder --out out --model folder", "folder"),
    ("train lora --data broken.jsonl --out out --model folder", "broken.jsonl"),
    ("train lora --data latin.jsonl --out out --model folder", "latin.jsonl"),
    ("train lora --data lines.jsonl --out folder --model folder", "--out folder is there already"),
    ("train lora --data lines.jsonl --out out --model folder", "--model folder can't be loaded"),
    ("train turbo-lora --data lines.jsonl --out out --model folder", "--model folder"),
    ("train turbo --data lines.jsonl --out out --model folder", "folder"),
    ("train demo-data order-json --out typo/out.jsonl", "typo/out.jsonl"),
    ("eval typo.jsonl --model folder", "typo.jsonl"),
    ("eval lines.jsonl --model folder", "folder"),
    ("bench compare typo.json", "typo.json"),
    ("bench compare lines.jsonl", "lines.jsonl"),
    ("bench serving --url nonsense", "--url"),
    ("bench step --model typo", "typo"),
    ("bench overhead --model typo", "typo"),
    ("bench turbo --model folder --store typo", "typo"),
    ("bench perplexity --model typo", "typo"),
    ("bench make-adapters --model typo --out out", "typo"),
    ("bench adapters-at-scale --model typo", "typo"),
    ("adapters show sqll --store holds", "did you mean 'sql'? see `quickchange adapters list`"),
    ("adapters unalias bset --store holds", "did you mean 'best'?"),
    ("serve --prot 1", "No such option: --prot; did you mean --port? `quickchange serve --help`"),
    ("serve --max_modle_len 9", "did you mean --max-model-len?"),
    ("serve --no-prefix-cach", "did you mean --no-prefix-cache?"),
    ("adapters list --stroe folder", "did you mean --store? `quickchange adapters list --help`"),
    ("keys create --tennant a", "did you mean --tenant?"),
    ("eval lines.jsonl --stroe folder", "did you mean --store? `quickchange eval --help`"),
    ("adapter list", "No such command 'adapter'. Did you mean 'adapters'?"),
    ("adapters lst", "No such command 'lst'. Did you mean 'list'?"),
    ("bench servng", "Did you mean 'serving'?"),
    ("serve --port x", "Invalid value for '--port'"),
    ("serve --xyzzy", "No such option: --xyzzy; `quickchange serve --help` tells what it takes"),
    ("adapters show", "'; `quickchange adapters show --help` tells what it takes"),
    ("completion csh", "'csh' is not one of 'bash', 'zsh', 'fish'"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_it_and_makes_nothing(
    command: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files()
    status, line = run(command, monkeypatch, capsys)
    assert (status in (1, 2), said in line) == (True, True), line
    assert files() == before


def test_a_benchmark_without_a_server_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        for command in (f"bench serving --url {url}", f"bench ab aa --url {url} --users 4"):
            status, line = run(command, monkeypatch, capsys)
            assert (status, "no answer from" in line, url in line) == (1, True, True), line
            assert "--url" in line


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['faker'] = None; from quickchange_server.cli import main; "
        "sys.argv[1:] = ['train', 'demo-data', 'order-json', '--out', 'out.jsonl']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "pip install 'quickchange[train]'" in line


@pytest.mark.parametrize(
    "command",
    [
        "serve --demo --port 0",
        "train lora --data lines.jsonl --out out",
        "adapters add a folder --model demo --store new",
    ],
)
def test_a_cache_folder_that_can_not_be_used_is_named(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", "file/cache")
    before = files()
    status, line = run(command, monkeypatch, capsys)
    assert (status, "file/cache" in line) == (1, True), line
    assert files() == before


def test_a_hub_model_is_not_waited_for_where_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quickchange_store import hub_access

    for name in ("HF_HUB_OFFLINE", *(f"{kind}_PROXY" for kind in ("HTTPS", "HTTP", "ALL"))):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
        for local in ("folder", "./folder", "/no/such/folder"):
            hub_access.look_for_hub(local)
            assert "HF_HUB_OFFLINE" not in os.environ
        hub_access.look_for_hub("owner/name")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        monkeypatch.delenv("HF_HUB_OFFLINE")
        probe.listen()
        hub_access.look_for_hub("owner/name")
        assert "HF_HUB_OFFLINE" not in os.environ


def test_demo_names_the_demos_model_and_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("quickchange_training.demo.ensure_demo_base", lambda: tmp_path / "base")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("QUICKCHANGE_STORE", "demo")
    store, base = str(tmp_path / "quickchange" / "demo"), str(tmp_path / "base")
    given = ["adapters", "add", "demo", "demo", "--model", "demo", "--store=demo"]
    expected = ["adapters", "add", "demo", "demo", "--model", base, f"--store={store}"]
    assert cli.with_demo_paths("adapters", given) == expected
    assert os.environ["QUICKCHANGE_STORE"] == store
    training = ["train", "lora", "--model", "demo", "--store", "demo"]
    assert cli.with_demo_paths("train", training) == [*training[:-1], store]
