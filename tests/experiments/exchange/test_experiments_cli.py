"""`quickchange experiments`: a server's experiments as files for gateways, and from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_support import BASE, Live, live_server, make_adapter
from keys_support import keyed_server, make_key
from typer.testing import CliRunner, Result

from quickchange_server.experiments.exchange.experiments_cli import app
from quickchange_store.store import Store

EXPERIMENT = {
    "name": "team/tone",
    "variants": [
        {"name": "now", "model": BASE, "weight": 3},
        {"name": "new", "model": "orders", "overrides": {"temperature": 0}},
    ],
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("cli")
    Store(folder).add("orders", make_adapter(1.0))
    with live_server(folder) as served:
        assert served.post("/v1/experiments", EXPERIMENT).status_code == 201
        yield served


def run(live: Live, *words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [*words, "--url", live.url], input=given)


def rewrite(name: str) -> dict[str, Any]:
    targets = [{"modelRewrite": BASE, "weight": 9}, {"modelRewrite": "orders", "weight": 1}]
    rule = {"matches": [{"model": {"type": "Exact", "value": name}}], "targets": targets}
    return {"kind": "InferenceModelRewrite", "metadata": {"name": name}, "spec": {"rules": [rule]}}


def test_an_export_is_the_resource_alone_and_names_the_rest(live: Live) -> None:
    told = run(live, "export", "team/tone", "--pool", "llama")
    assert told.exit_code == 0, told.stderr
    answer = live.http.get("/v1/model-rewrites/team/tone?pool=llama").json()
    assert json.loads(told.stdout) == answer["rewrite"]
    assert "left out: variants: the overrides of 'new'" in told.stderr


@pytest.mark.parametrize("written", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_a_file_becomes_an_experiment(live: Live, tmp_path: Path, written: Any) -> None:
    name = f"of-{written.__name__}"
    file = tmp_path / "rewrite"
    file.write_text(written(rewrite(name)))
    told = run(live, "import", str(file))
    assert (told.exit_code, told.stdout) == (0, f"{name}\n"), told.stderr
    shares = live.http.get(f"/v1/experiments/{name}").json()["shares"]
    assert sorted(shares.values()) == [0.1, 0.9]


def test_all_rewrites_of_a_file_are_taken_and_other_kinds_passed_over(live: Live) -> None:
    both = {"kind": "List", "items": [{"kind": "InferencePool"}, rewrite("second")]}
    text = yaml.safe_dump_all([{"kind": "ConfigMap"}, rewrite("first"), None, both])
    told = run(live, "import", "-", given=text)
    assert (told.exit_code, told.stdout) == (0, "first\nsecond\n"), told.stderr


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ("kind: [", 2, "neither YAML nor JSON"),
        ("kind: ConfigMap", 2, "no resource of the kind InferenceModelRewrite"),
        ("", 2, "no resource of the kind InferenceModelRewrite"),
        (json.dumps(rewrite(BASE)), 1, BASE),
        ("kind: InferenceModelRewrite", 1, "spec: is required"),
    ],
)
def test_what_can_not_be_imported_is_said_in_a_line(
    live: Live, given: str, status: int, said: str
) -> None:
    told = run(live, "import", "-", given=given)
    assert told.exit_code == status
    assert said in " ".join(told.stderr.replace("│", " ").split())


def test_an_unknown_experiment_is_said_in_the_servers_words(live: Live) -> None:
    told = run(live, "export", "nobody?x", "--pool", "llama")
    assert told.exit_code == 1
    assert told.stderr.startswith("quickchange: ")
    assert "nobody?x" in told.stderr


def test_a_server_with_keys_is_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = make_key(tmp_path, "acme", "manage", ("*",))
    Store(tmp_path).add("orders", make_adapter(1.0))
    with keyed_server(tmp_path) as server:
        given = json.dumps(rewrite("split"))
        refused = run(server, "import", "-", given=given)
        assert (refused.exit_code, "API key" in refused.stderr) == (1, True)
        monkeypatch.setenv("QUICKCHANGE_API_KEY", secret)
        assert run(server, "import", "-", given=given).stdout == "split\n"
