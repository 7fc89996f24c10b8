"""The README's code blocks do what they say: make targets exist, commands parse, curls answer."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from http_support import live_server, make_adapter

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for line in "\n".join(BLOCKS).splitlines() if line and not line.startswith(" ")]
CURLS = [
    curl for block in BLOCKS for curl in re.split(r"^(?=curl )", block, flags=re.MULTILINE)[1:]
]
DEMO_NAMES = ("order-json", "order-json-turbo", "sql", "docstring")
SECONDS = 60


def lines_of(program: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(f"{program} ")]


@pytest.mark.parametrize("command", lines_of("make"))
def test_make_targets_exist(command: str) -> None:
    target = shlex.split(command, comments=True)[1]
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", lines_of("quickchange"))
def test_commands_have_the_options_they_are_given(command: str) -> None:
    words = shlex.split(command)[1:]
    group = words[:2] if words[0] in ("adapters", "train", "bench") else words[:1]
    code = "from quickchange_server.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code, *group, "--help"],
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in shown, f"{command}: no {option}"


def test_curls_are_answered(tmp_path: Path) -> None:
    assert len(CURLS) >= 5
    with live_server(tmp_path, served_model_name="SmolLM2-135M-Instruct") as live:
        for value, name in enumerate(DEMO_NAMES, start=1):
            live.store.add(name, make_adapter(float(value)))
        for curl in CURLS:
            command = curl.replace("http://127.0.0.1:8000", live.url)
            command = command.replace("curl ", "curl -sS --fail-with-body ", 1)
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, (curl, done.stdout, done.stderr)
            if "completions" in curl:
                assert json.loads(done.stdout)["choices"], curl


def test_documents_that_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
