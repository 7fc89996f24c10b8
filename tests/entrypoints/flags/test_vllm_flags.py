"""vLLM's flags on the command line of `quickchange serve`, as KServe's manifests pass them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server import cli
from quickchange_server.config import Settings
from quickchange_server.entrypoints import serve as launch
from quickchange_server.entrypoints.flags.vllm_flags import RULES, translated
from quickchange_server.errors import SettingError

SWITCHES = {"--demo", "--turbo", "--no-turbo", "--adapters", "--prefix-cache"}
HOME = ["--store", "there"]


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QUICKCHANGE_MODEL", "QUICKCHANGE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def arguments_of(line: str) -> list[str]:
    made = translated([*shlex.split(line), *HOME], SWITCHES).arguments
    assert made[-2:] == HOME
    return made[:-2]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("org/base --port 8000", "--model org/base --port 8000"),
        ("--port=8000 org/base", "--model org/base --port=8000"),
        ("--turbo org/base", "--model org/base --turbo"),
        ("--enable-lora", "--adapters"),
        ("--enable_lora", "--adapters"),
        ("--no-enable-lora", "--no-adapters"),
        ("--max-lora-rank=32", "--max-adapter-rank 32"),
        ("--max_lora_rank 32", "--max-adapter-rank 32"),
        ("--tensor-parallel-size 2", "--tensor-parallel 2"),
        ("-tp 2", "--tensor-parallel 2"),
        ("--max-model-len 8192", "--max-model-len 8192"),
        ("--max-model-len 8k", "--max-model-len 8000"),
        ("--max-model-len 1.5K", "--max-model-len 1536"),
        ("--max-model-len auto", ""),
        ("--max-model-len -1", ""),
        ("--max-num-seqs 64", "--max-sequences 64"),
        ("--max-num-batched-tokens 2K", "--max-batch-tokens 2048"),
        ("--gpu-memory-utilization 0.95", "--gpu-memory-utilization 0.95"),
        ("--dtype half", "--dtype float16"),
        ("--dtype bfloat16", "--dtype bfloat16"),
        ("--lora-dtype auto", "--adapter-dtype model"),
        ("--served-model-name a p/b --port 1", "--served-model-name a,p/b --port 1"),
        ("--served-model-name=a", "--served-model-name a"),
        ("--model_name=m --model_id org/base", "--served-model-name m --model org/base"),
        ("--model_dir=/mnt/models --http_port 8080", "--model /mnt/models --port 8080"),
        ("--shutdown-timeout 15", "--drain-seconds 15"),
        ("--uds=/run/a.sock --root-path /llm", "--uds /run/a.sock --root-path /llm"),
        ("--no-enable-prefix-caching", "--no-prefix-cache"),
        ("--lora-modules a=/a b=/b --port 1", "--lora-modules a=/a --lora-modules b=/b --port 1"),
        ("--lora-modules=a=/mnt/a", "--lora-modules a=/mnt/a"),
        ("--pipeline-parallel-size 1 --load-format auto", ""),
        ("--kv-cache-dtype auto -dp 1", ""),
        ("--enforce-eager --trust-remote-code", ""),
        ("--tool-call-parser hermes --enable-auto-tool-choice", ""),
        ("--disable-access-log-for-endpoints /health,/metrics,/ping --port 1", "--port 1"),
    ],
)  # fmt: skip
def test_flags_become_options(line: str, wanted: str) -> None:
    assert arguments_of(line) == wanted.split()


KSERVE = (
    "/mnt/models --served-model-name llama publishers/team/models/llama --port 8000 "
    "--disable-access-log-for-endpoints /health,/metrics,/ping --shutdown-timeout 15 "
    "--enable-lora --max-lora-rank=64 --max-loras=4 --max-cpu-loras=8 --lora-modules "
    """'{"name":"sql","path":"/mnt/lora/sql"}' """
    """'{"name":"publishers/team/models/sql","path":"/mnt/lora/sql"}'"""
)


def test_the_line_that_kserve_writes_becomes_settings_and_hints() -> None:
    made = translated(shlex.split(KSERVE), SWITCHES)
    assert made.arguments[:2] == ["--model", "/mnt/models"]
    names = made.arguments.index("--served-model-name") + 1
    assert made.arguments[names] == "llama,publishers/team/models/llama"
    assert made.arguments.count("--lora-modules") == 2
    told = "\n".join(made.lines)
    assert "--max-loras 4 changes nothing here" in told
    assert "--max-cpu-loras 8 changes nothing here" in told
    assert "--disable-access-log-for-endpoints" in told


@pytest.mark.parametrize(
    ("line", "name", "remedy"),
    [
        ("--pipeline-parallel-size 2", "--pipeline-parallel-size", "--tensor-parallel"),
        ("--kv-cache-dtype=fp8", "--kv-cache-dtype", "floats"),
        ("--api-key secret", "--api-key", "quickchange keys create"),
        ("--enable-expert-parallel", "--enable-expert-parallel", "--tensor-parallel"),
        ("--chat-template my.jinja", "--chat-template", "chat_template.jinja"),
        ("--ssl-keyfile k", "--ssl-keyfile", "proxy"),
        ("a b", "model", "one model"),
        ("--max-loras", "--max-loras", "value is missing"),
    ],
)
def test_what_is_not_done_is_refused_by_name_with_what_to_do(
    line: str, name: str, remedy: str
) -> None:
    with pytest.raises(SettingError, match=re.escape(name)) as raised:
        translated(shlex.split(line), SWITCHES)
    assert remedy in raised.value.message


def test_a_line_for_vllm_gets_a_store_of_its_models_own(tmp_path: Path) -> None:
    one, other, again = (
        translated(["org/" + name], SWITCHES).arguments[-1] for name in ("a", "b", "a")
    )
    assert one == again != other
    assert Path(one).is_relative_to(tmp_path)


@pytest.mark.parametrize("line", ["--port 1", "--model org/base --turbo", "--demo", "--help"])
def test_a_line_of_our_own_options_stays_as_it_is(line: str) -> None:
    made = translated(line.split(), {*SWITCHES, "--help"})
    assert made.arguments == line.split()
    assert made.lines == []


def test_every_setting_that_a_flag_becomes_exists() -> None:
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for flag, rule in RULES.items():
        if rule.setting is not None and rule.setting != "--lora-modules":
            assert rule.setting.replace("--no-", "--") in options, flag
        assert (rule.setting, rule.hint, rule.refused).count(None) == 2, flag


@given(values=st.lists(st.from_regex(r"[a-z{][a-z=/{}:\"]{0,12}", fullmatch=True), min_size=1))
def test_any_values_up_to_the_next_flag_are_modules(values: list[str]) -> None:
    made = translated(["--lora-modules", *values, "--port", "1", *HOME], SWITCHES).arguments
    assert made[1 : 2 * len(values) : 2] == values
    assert made[2 * len(values) :] == ["--port", "1", *HOME]


def test_the_command_gets_settings_and_modules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got: dict[str, Any] = {}

    def serve(given: dict[str, Any], **more: Any) -> None:
        got.update(given, **more)

    monkeypatch.setattr(launch, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["quickchange", "serve", *shlex.split(KSERVE)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert got["model"] == "/mnt/models"
    assert got["port"] == 8000
    assert got["adapters"] is True
    assert got["max_adapter_rank"] == 64
    assert got["drain_seconds"] == 15
    assert [module[:9] for module in got["modules"]] == ['{"name":"'] * 2
    assert Settings(
        **{k: v for k, v in got.items() if k in Settings.model_fields}
    ).served_names == ("llama", "publishers/team/models/llama")
    assert "--max-loras 4 changes nothing here" in capsys.readouterr().err


def test_the_document_has_every_flag_on_its_side() -> None:
    text = (Path(__file__).parents[3] / "docs" / "gateways.md").read_text()
    rows = dict(re.findall(r"^\| (mapped|hints|refused) \| (.+) \|$", text, re.MULTILINE))
    told = {kind: set(re.findall(r"`(--[\w-]+)", listed)) for kind, listed in rows.items()}
    sides = {"mapped": "setting", "hints": "hint", "refused": "refused"}
    for kind, attribute in sides.items():
        wanted = {flag for flag, rule in RULES.items() if getattr(rule, attribute) is not None}
        assert {flag for flag in wanted if not flag.startswith("--no-")} <= told[kind], kind
