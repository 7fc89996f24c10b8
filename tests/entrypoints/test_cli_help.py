"""The command line's help and completion: nothing that one types is cut, at any width."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from quickchange_server import cli

WIDTHS = (40, 60, 80, 100, 200)


def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """A command and all within it, by the words that name it."""
    yield " ".join(words), command
    for name, each in getattr(command, "commands", {}).items():
        yield from below(each, (*words, name))


def every_command() -> dict[str, Any]:
    found = dict(below(typer.main.get_command(cli.app), (cli.PROGRAM,)))
    for name, (module, _) in cli.SUB_APPS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        found |= dict(below(command, (cli.PROGRAM, name)))
    return found


COMMANDS = every_command()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_every_name_whole(words: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    command = COMMANDS[words]
    told = command.get_help(command.context_class(command, info_name=words)).split()
    options = [
        name
        for param in command.params
        if param.param_type_name == "option"
        for name in (*param.opts, *param.secondary_opts)
    ]
    assert [
        name for name in (*options, *getattr(command, "commands", {})) if name not in told
    ] == []


def test_help_tells_of_each_command_without_a_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["quickchange", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "Serve on several engines, of one machine or many, with Ray Serve." in told
    assert "..." not in told.removeprefix("Usage: quickchange [OPTIONS] COMMAND [ARGS]...")


def test_help_of_all_commands_imports_none_of_them() -> None:
    names = [module for module, _ in cli.SUB_APPS.values()]
    code = (
        "import sys; from quickchange_server.cli import main; sys.argv[1:] = ['--help']\n"
        f"try: main()\nfinally: print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- completion ---------------------------------------------------------------------------------

COMPLETED = [
    ("quickchange ada", ["adapters"]),
    ("quickchange adapters unal", ["unalias"]),
    ("quickchange serve --por", ["--port"]),
    ("quickchange serve --dtype ", ["auto", "float32", "bfloat16", "float16"]),
    ("quickchange keys create --scope m", ["manage"]),
    ("quickchange completion ", ["bash", "zsh", "fish"]),
]


def completed(
    line: str, shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the program answers to the script of zsh or fish."""
    monkeypatch.setenv(cli.COMPLETING, f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setattr(sys, "argv", ["quickchange"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_fish_gets_what_may_follow(
    line: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = completed(line, "fish", monkeypatch, capsys)
    assert [each.partition("\t")[0] for each in told.splitlines()] == expected


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_zsh_gets_what_may_follow(
    line: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = completed(line, "zsh", monkeypatch, capsys)
    assert [told.count(f'"{each}"') for each in expected] == [1] * len(expected)


def test_the_script_for_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "quickchange"
    start = "from quickchange_server.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    script = """
      eval "$(quickchange completion bash)"
      COMP_WORDS=(quickchange adapters unal) COMP_CWORD=2
      _quickchange_completion quickchange
      echo "${COMPREPLY[*]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    assert done.stdout.strip() == "unalias"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shells_script_asks_by_the_variable_that_the_program_answers_to(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickchange", "completion", shell])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{cli.COMPLETING}=complete_{shell}" in capsys.readouterr().out
