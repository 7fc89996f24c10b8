"""Adapters that the command line names are served; a broken one is an error with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_support import BASE_SPEC, write_peft
from hypothesis import given
from hypothesis import strategies as st
from llm_models import LlmModels, make_llm_models

from quickchange_server.entrypoints import serve as launch
from quickchange_server.entrypoints.flags.lora_modules import (
    LoraModule,
    add_modules,
    lora_modules,
)
from quickchange_server.errors import SettingError
from quickchange_store.store import Store

NAMES = st.from_regex(r"[a-z][a-z0-9/._-]{0,20}", fullmatch=True)


@given(name=NAMES, path=st.from_regex(r"/[a-z=/ .-]{1,20}[a-z]", fullmatch=True))
def test_both_of_vllms_forms_mean_the_same(name: str, path: str) -> None:
    form = json.dumps({"name": name, "path": path, "base_model_name": "org/base"})
    wanted = (LoraModule(name, path),)
    assert lora_modules([f"{name}={path}"]) == wanted
    assert lora_modules([form]) == lora_modules([f"'{form}'"]) == wanted


def test_the_last_of_several_modules_of_one_name_counts() -> None:
    assert lora_modules(["a=/x", "b=/y", "a=/z"]) == (LoraModule("a", "/z"), LoraModule("b", "/y"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sql", "neither NAME=PATH nor"),
        ("=path", "neither NAME=PATH nor"),
        ("name=", "neither NAME=PATH nor"),
        ("{", "not valid JSON"),
        ('{"name": "a"}', "name and path are required"),
        ('{"name": 1, "path": "x"}', "name and path are required"),
        ('{"name": "a", "path": "x", "rank": 3}', "unknown field 'rank'"),
    ],
)
def test_a_module_that_can_not_be_read_is_refused_with_its_text(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match="lora_modules: ") as raised:
        lora_modules([text])
    assert problem in raised.value.message
    assert raised.value.param == "lora_modules"


def test_modules_are_published_and_published_again_are_the_same_version(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), write_peft(tmp_path / "sql")
    modules = [LoraModule("sql", str(folder)), LoraModule("team/models/sql", str(folder))]
    for _ in range(2):
        add_modules(modules, store, BASE_SPEC, ["base"])
    assert store.names() == ("sql", "team/models/sql")
    assert [version.number for version in store.versions("sql")] == [1]


def test_a_broken_module_is_an_error_with_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    broken = write_peft(tmp_path / "broken", r=7)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    for module, problem in (
        (LoraModule("sql", str(broken)), "'sql' can't be added: "),
        (LoraModule("sql", str(tmp_path / "typo")), "'sql': .*typo is not a folder"),
        (LoraModule("base", str(broken)), "'base' is the base model's name"),
        (LoraModule("a b", str(write_peft(tmp_path / "good"))), "'a b' can't be added: "),
    ):
        with pytest.raises(SettingError, match=problem):
            add_modules([module], store, BASE_SPEC, ["base"])
    assert store.names() == ()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> LlmModels:
    return make_llm_models(tmp_path_factory.mktemp("models"))


def test_serve_adds_them_before_it_listens(
    models: LlmModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[tuple[str, ...]] = []

    def run(_app: Any, settings: Any, *_: Any) -> None:
        names.append(Store(settings.store).names())

    monkeypatch.setattr(launch, "run", run)
    (name, path), *_ = models.adapters.items()
    given = {"model": str(models.path), "store": str(tmp_path), "port": 0}
    launch.serve(given, demo=False, modules=[f"mine={path}", f"{name}={path}"])
    assert names == [tuple(sorted(["mine", name]))]


@pytest.mark.parametrize(
    ("changes", "modules", "problem"),
    [
        ({}, ["sql=/nowhere"], "lora_modules: 'sql': /nowhere is not a folder"),
        ({}, ["sql"], "lora_modules: 'sql' is neither"),
        ({"adapters": False}, ["sql=/nowhere"], "switched off by --no-adapters"),
    ],
)
def test_a_wrong_module_ends_the_start_in_one_line(
    models: LlmModels,
    tmp_path: Path,
    changes: dict[str, Any],
    modules: list[str],
    problem: str,
) -> None:
    given = {"model": str(models.path), "store": str(tmp_path / "store"), "port": 0, **changes}
    with pytest.raises(SystemExit) as ended:
        launch.serve(given, demo=False, modules=modules)
    assert problem in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
