"""The documents say what is: links resolve, commands parse, curls are answered."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from http_support import Live, live_server, make_adapter, make_turbo, write_peft
from keys_support import keyed_server, make_key
from text_support import byte_text
from typer.core import TyperGroup

from quickchange_server.cli import SUB_APPS, with_vllm_flags
from quickchange_server.cli import app as quickchange
from quickchange_server.config import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
KUBERNETES = ROOT / "docker" / "kubernetes" / "quickchange.yaml"
DEMO_BASE = "SmolLM2-135M-Instruct"
ADAPTERS = ("order-json", "order-json-turbo", "sql", "docstring", "acme/sql")
HEADS = ("order-fitted", "order-refreshed")
SECONDS = 60


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def blocks(file: Path, *languages: str) -> list[str]:
    """The file's code blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def commands(file: Path) -> list[list[str]]:
    """The words of each command in the file's shell blocks."""
    lines = "\n".join(blocks(file, "bash", "sh")).replace("\\\n", " ").splitlines()
    programs = ("quickchange ", "docker ", "make ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(programs)]


def of_program(program: str) -> list[list[str]]:
    """The words of each command of a program, up to where its output goes."""
    found = [words for file in DOCUMENTS for words in commands(file) if words[0] == program]
    return [words[: words.index(">")] if ">" in words else words for words in found]


def mentioned(file: Path) -> list[list[str]]:
    """The words of each `quickchange …` in the file's text."""
    spans = re.findall(r"`(quickchange\s[^`]+)`", file.read_text())
    return [shlex.split(span) for span in spans]


# --- links --------------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    """The fragments that a page's headings have."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def links(file: Path) -> Iterator[tuple[Path, str]]:
    """The files of this project that a document links, each with the fragment."""
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, fragment = target.partition("#")
            yield (file.parent / path).resolve() if path else file, fragment


@pytest.mark.parametrize("file", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(file: Path) -> None:
    for target, fragment in links(file):
        assert target.exists(), target
        assert not fragment or fragment in anchors(target), f"{target}#{fragment}"


def test_every_document_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        linked = {target for file in new for target, _ in links(file) if target.suffix == ".md"}
        new = linked - reached
    assert set(DOCUMENTS) <= reached


# --- commands -----------------------------------------------------------------------------------


def application(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The command that takes `quickchange WORDS…`, and what it is given."""
    command: Any = typer.main.get_command(quickchange)
    rest = list(words)
    if rest[0] in SUB_APPS:
        command = typer.main.get_command(importlib.import_module(SUB_APPS[rest.pop(0)][0]).app)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("--"):
        assert rest[0] in command.commands, f"no command {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    return command, rest


def check_parses(words: Sequence[str]) -> None:
    command, given = application(words)
    assert not isinstance(command, TyperGroup), f"no command {' '.join(words)}"
    command.make_context("quickchange", given)  # raises a UsageError where it can't be


@pytest.mark.parametrize("words", of_program("quickchange"), ids=" ".join)
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKCHANGE_MODEL", "path/to/model")
    monkeypatch.setenv("QUICKCHANGE_STORE", "path/to/store")
    for folder in ("path/to/peft-folder", "path/to/heads", "path/to/model"):
        Path(folder).mkdir(parents=True)
    for file in ("orders.jsonl", "held-out.jsonl"):
        Path(file).touch()
    check_parses(with_vllm_flags(words[1:]))


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_commands_in_the_text_have_these_options(file: Path) -> None:
    for words in mentioned(file):
        command, given = application([word for word in words[1:] if word != "…"])
        known = {option for each in command.params for option in each.opts + each.secondary_opts}
        for option in (word for word in given if word.startswith("--")):
            assert option in known, f"{' '.join(words)}: no {option}"


@pytest.mark.parametrize("words", of_program("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)


# --- containers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", of_program("docker"), ids=" ".join)
def test_containers_are_given_what_there_is(words: list[str]) -> None:
    for place, word in enumerate(words):
        if word == "-f":
            assert (ROOT / words[place + 1]).is_file()
        if word == "-e":
            name = words[place + 1].partition("=")[0].removeprefix("QUICKCHANGE_").lower()
            assert name in Settings.model_fields
    image = next((place for place, word in enumerate(words) if word.startswith("quickchange:")), -1)
    assert image >= 0 or words[1] == "compose"
    if words[1] == "run" and words[image + 1 :]:
        check_parses(words[image + 1 :])


def test_the_first_key_is_made_as_the_manifest_says() -> None:
    head = KUBERNETES.read_text().partition("apiVersion")[0].replace("\\\n#", " ")
    (line,) = re.findall(r"^#\s+kubectl run .* -- (.*)$", head, re.MULTILINE)
    check_parses(shlex.split(line))


# --- requests -----------------------------------------------------------------------------------


def curls(file: Path) -> list[str]:
    shell = blocks(file, "bash", "sh")
    return [c for block in shell for c in re.split(r"^(?=curl )", block, flags=re.MULTILINE)[1:]]


@contextmanager
def server_for(file: Path, store: Path) -> Iterator[tuple[Live, Mapping[str, str]]]:
    """A server with what the document speaks of, and the variables that its commands use."""
    text = byte_text()  # has an end of sequence, which constraints need
    if "$ADMIN_KEY" not in file.read_text():
        with live_server(store, served_model_name=DEMO_BASE, text=text) as live:
            yield live, {}
        return
    _, secret = make_key(store, "acme", "infer", ("acme/*",))
    with keyed_server(store, served_model_name=DEMO_BASE, text=text) as live:
        admin = live.http.headers["Authorization"].removeprefix("Bearer ")
        yield live, {"ADMIN_KEY": admin, "KEY": secret}


@pytest.mark.parametrize("file", [file for file in DOCUMENTS if curls(file)], ids=name_of)
def test_curls_are_answered(file: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "sql", 7.0)
    with server_for(file, tmp_path / "store") as (live, variables):
        for value, name in enumerate(ADAPTERS, start=1):
            live.store.add(name, make_adapter(float(value)))
        for value, name in enumerate(HEADS, start=1):
            live.store.add(name, make_turbo(float(value)))
        for curl in curls(file):
            command = re.sub(r"http://127\.0\.0\.1:8000|localhost:8000", live.url, curl)
            command = command.replace("curl ", "curl -sS --fail-with-body ", 1)
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"], **variables},
            )
            assert done.returncode == 0, (curl, done.stdout, done.stderr)
            if "completions" in curl:
                _, _, body = done.stdout.rpartition("\n\n")  # behind the headers of `curl -i`
                assert json.loads(body)["choices"], curl
