"""The command line: what it prints, how it fails, how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from http_support import expected_text, make_adapter, wait_until
from text_support import CHAT_TEMPLATE, byte_tokenizer
from typer.testing import CliRunner

from quickchange_server import cli
from quickchange_server.config import Settings
from quickchange_server.entrypoints import serve as launch
from quickchange_server.errors import SettingError
from quickchange_server.frontend.tokenizer import Text
from quickchange_store.store import Store

SCRIPT = Path(__file__).parents[1] / "support" / "serve_fake.py"
LIMIT_SECONDS = 600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a configuration, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "eos_token_id": 5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process of its own, ended by its id."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LIMIT_SECONDS)


def test_the_start_tells_what_takes_how_much_memory(caplog: pytest.LogCaptureFixture) -> None:
    services = SimpleNamespace(
        settings=SimpleNamespace(adapters=False),
        catalog=SimpleNamespace(base_name="tiny"),
        engine=SimpleNamespace(memory="  base  1.0 MiB"),
    )
    with caplog.at_level(logging.INFO):
        launch._announce(services, "http://127.0.0.1:8000", demo=False)  # type: ignore[arg-type]
    assert "memory:\n  base  1.0 MiB" in caplog.text


def test_the_server_says_when_it_is_ready_and_drains_on_sigterm(
    model: Path, tmp_path: Path
) -> None:
    Store(tmp_path).add("sql", make_adapter(1.0))
    port = free_port()
    options = [f"model={model}", f"store={tmp_path}", f"port={port}", "drain_seconds=30"]
    request = {"model": "tiny", "prompt": "Hello", "seed": 1, "max_tokens": 30, "stream": True}
    with serving("0.05", "", *options) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{port}"
        line = process.stdout.readline()
        assert line == f"Quickchange is ready on {url} (model tiny, 1 adapter)\n"
        with (
            httpx.Client(base_url=url, timeout=LIMIT_SECONDS) as client,
            client.stream("POST", "/v1/completions", json=request) as response,
        ):
            lines = response.iter_lines()
            streamed = [next(lines)]
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health").status_code == 503)
            streamed += [line for line in lines if line]
        chunks = [json.loads(line.removeprefix("data: ")) for line in streamed[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == expected_text(1, 5, 30)
        assert process.wait(LIMIT_SECONDS) == 0


def test_an_engine_that_can_not_start_is_one_line_and_status_1_and_leaves_no_store(
    model: Path, tmp_path: Path
) -> None:
    options = [f"model={model}", f"store={tmp_path}/new/store", "port=0"]
    with serving("0", "model: the weights are missing", *options) as process:
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("quickchange: ")
    assert "the weights are missing" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def catches(pid: int, number: signal.Signals) -> bool:
    """True if the process has a handler of its own for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_starts_is_one_line_and_the_shells_status(
    model: Path, tmp_path: Path, received: signal.Signals
) -> None:
    options = [f"model={model}", f"store={tmp_path}/new/store", "port=0", "start_seconds=60"]
    with serving("0", "", *options) as process:
        assert process.stderr is not None
        while "starting the engine" not in process.stderr.readline():
            pass
        wait_until(lambda: catches(process.pid, signal.SIGTERM))  # it serves, and its engine starts
        assert (tmp_path / "new").exists()
        process.send_signal(received)
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + received
    assert errors.splitlines()[-1] == f"quickchange: ended by {received.name} before it was ready"
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_a_server_that_is_ready_has_made_its_store(model: Path, tmp_path: Path) -> None:
    options = [f"model={model}", f"store={tmp_path}/new", "port=0"]
    with serving("0", "", *options) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("0 adapters)\n")
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    assert Store.at(tmp_path / "new").names() == ()
    assert (tmp_path / "new" / "quickchange.sqlite3").exists()


def test_a_missing_model_is_one_line_and_status_1(tmp_path: Path) -> None:
    options = ["model=/no/such/model", f"store={tmp_path}", "port=0"]
    with serving("0", "", *options) as process:
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("quickchange: model: there is no folder")
    assert "Traceback" not in errors


def test_a_taken_port_is_one_line_and_status_1(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = [f"model={model}", f"store={tmp_path}", f"port={port}"]
        with serving("0", "", *options) as process:
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    assert f"can't listen on 127.0.0.1 port {port}" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_help_is_quick_because_it_imports_little() -> None:
    code = (
        "import sys\nfrom quickchange_server import cli\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_and_every_setting() -> None:
    runner = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    commands = runner.invoke(cli.app, ["--help"]).output
    assert all(name in commands for name in ("serve", "adapters", "train", "bench"))
    options = runner.invoke(cli.app, ["serve", "--help"]).output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in options


def given_settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    """What `serve` with these arguments hands on."""
    received: dict[str, object] = {}

    def launch(given: dict[str, object], *, demo: bool, modules: list[str]) -> None:
        assert modules == []
        received.update(given, demo=demo)

    monkeypatch.setattr("quickchange_server.entrypoints.serve.serve", launch)
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    return received


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_settings(
        monkeypatch, "--model", "m", "--max-queue", "5", "--no-adapters", "--drain-seconds", "1.5"
    )
    expected = {"model": "m", "max_queue": 5, "adapters": False, "drain_seconds": 1.5}
    assert given == {**expected, "demo": False}


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKCHANGE_MODEL", "other")
    monkeypatch.setenv("QUICKCHANGE_STORE", "store")
    monkeypatch.setenv("QUICKCHANGE_PORT", "1")
    given = given_settings(monkeypatch, "--model", "m")
    given.pop("demo")
    settings = Settings(**given)
    assert (settings.model, settings.port) == ("m", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "s"], "--model (or QUICKCHANGE_MODEL) is required"),
        (["--model", "m", "--store", "s", "--port", "70000"], "--port (or QUICKCHANGE_PORT)"),
        (["--model", "m", "--store", "s", "--dtype", "int3"], "--dtype (or QUICKCHANGE_DTYPE)"),
    ],
)
def test_a_bad_setting_is_named_with_its_option(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.delenv("QUICKCHANGE_MODEL", raising=False)
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 1
    assert said in result.output + str(result.exception)


def test_a_model_folder_gives_its_tokenizer_vocabulary_and_every_eos(model: Path) -> None:
    text = Text.load(str(model))
    assert text.vocab_size == 300
    assert text.eos_ids == {5, 6, 7, 257}
    assert text.encode_now("Hé") == list("Hé".encode())


def test_a_folder_without_a_tokenizer_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingError, match="model: can't read"):
        Text.load(str(tmp_path))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_only_loopback_addresses_are_served_without_a_warning(
    host: str, loopback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(model="m", store=Path("s"), host=host, allow_unauthenticated=True)
    launch.check_access(settings)
    assert ("without asking for API keys" in caplog.text) is not loopback


def test_the_demo_has_its_own_model_and_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("quickchange_training.demo.ensure_demo_base", lambda: tmp_path / "base")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("QUICKCHANGE_STORE", raising=False)
    settings = launch.with_demo({"port": 1})
    assert settings == {
        "port": 1,
        "model": str(tmp_path / "base"),
        "store": tmp_path / "data" / "quickchange" / "demo",
    }
    assert launch.with_demo({"store": "mine"})["store"] == "mine"


def test_the_demo_and_a_model_exclude_each_other() -> None:
    with pytest.raises(SystemExit, match="--demo brings its own model"):
        launch.with_demo({"model": "m"})
