"""The command `quickchange cluster`: its options, and mistakes as one line."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from quickchange_server import cli
from quickchange_server.cluster import start
from quickchange_server.cluster.cluster_settings import ClusterSettings
from quickchange_server.config import Settings

GIVEN = ("--model", "no-model", "--store", "no-store")


def message_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: Sequence[str]
) -> str:
    """What the command prints of a mistake, which is one line."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", ["quickchange", "cluster", *GIVEN, *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    message = ended.value.code if isinstance(ended.value.code, str) else printed.err
    assert ended.value.code not in (0, None)
    assert len(message.strip().splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engines", "0"], "--engines"),
        (["--ingresses", "0"], "--ingresses"),
        (["--engines", "3", "--max-engines", "2"], "max_engines"),
        (["--surge-percent", "101"], "--surge-percent"),
        (["--kv-target", "0"], "--kv-target"),
        (["--detach"], "RAY_ADDRESS"),
        (["--port", "70000"], "--port"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_option(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    named: str,
) -> None:
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    assert named in message_of(monkeypatch, capsys, options)


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else found(name)
    )
    message = message_of(monkeypatch, capsys, [])
    assert (
        message == "error: this needs ray, which is not installed: pip install 'quickchange[ray]'\n"
    )


def test_every_setting_of_a_server_and_of_a_cluster_is_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickchange", "cluster", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for name in (*Settings.model_fields, *ClusterSettings.model_fields, "detach"):
        assert f"--{name.replace('_', '-')}"[:30] in shown


def test_ray_listens_on_loopback_unless_the_host_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    for host, joins, told in (("0.0.0.0", False, None), ("127.0.0.1", True, None)):
        start._prepare_environment(Settings(model="m", store="s", host=host), joins=joins)
        assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") is told
    start._prepare_environment(Settings(model="m", store="s"), joins=False)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"  # what is set stays


def test_the_token_file_is_its_owners_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    start._protect_token()
    assert token.stat().st_mode & 0o777 == 0o600
    token.unlink()
    start._protect_token()  # given in the environment instead


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [
                "Failed to update the deployments ['Engine'].",
                "The deployment failed to start 3 times in a row. Error:\n"
                'Traceback (most recent call last):\n  File "x.py", line 1, in f\n'
                "quickchange_server.errors.EngineFailedError: the engine could not start: no such"
                " file\n",
            ],
            "the engine could not start: no such file",
        ),
        (["ray.exceptions.RayTaskError(RuntimeError): boom: it\nValueError: last"], "last"),
        (["no traceback at all"], "no traceback at all"),
        ([], "no reason was given"),
    ],
)
def test_the_reason_of_a_failed_start_is_the_last_error_that_serve_tells(
    messages: list[str], reason: str
) -> None:
    assert start.reason_of(messages) == reason
