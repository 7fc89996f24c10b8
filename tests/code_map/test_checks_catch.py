"""Each check finds a violation made for it, and nothing where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from checks import (
    CodeMap,
    blocking_uploads,
    folder_cycles,
    full_folders,
    needless_modules,
    needless_symbols,
    repeated_class_names,
    repeated_module_names,
    unmatched_tests,
)
from source_tree import REPOSITORY, SourceTree

CONTRACTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]


class Tree:
    """A made-up repository with one package, `sample`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tests").mkdir()
        (root / "pyproject.toml").touch()
        self.add("__init__")

    def add(self, module: str, text: str = "") -> None:
        path = self.root / "server" / "sample" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)

    def list_exception(self, table: str, name: str, reason: str) -> None:
        (self.root / "pyproject.toml").write_text(
            f'[tool.quickchange.{table}]\n"{name}" = "{reason}"\n'
        )

    @property
    def map(self) -> CodeMap:
        return CodeMap(SourceTree.read(self.root))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def only(findings: Any) -> str:
    (finding,) = findings
    assert isinstance(finding, str)
    return finding


def test_a_full_folder(tree: Tree) -> None:
    for number in range(12):
        tree.add(f"folder/module_{number}")
    assert not list(full_folders(tree.map))
    tree.add("folder/one_more")
    assert "server/sample/folder has 13 modules" in only(full_folders(tree.map))


@pytest.mark.parametrize(
    "back",
    [
        "from sample.upper.one import X",
        "def f():\n    from sample.upper import one\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sample.upper.one import X\n",
    ],
    ids=["plain", "in a function", "for type checkers"],
)
def test_a_folder_cycle(tree: Tree, back: str) -> None:
    tree.add("errors", "")
    tree.add("cli", "from sample.upper import one")
    tree.add("upper/one", "from sample.lower import two\nfrom sample import errors")
    tree.add("lower/two")
    tree.add("lower/three")
    assert not list(folder_cycles(tree.map))
    tree.add("lower/three", back)
    finding = only(folder_cycles(tree.map))
    assert "sample.lower, sample.upper import one another" in finding
    assert "sample.lower.three → sample.upper.one" in finding


def test_a_class_name_used_twice(tree: Tree) -> None:
    tree.add("one", "class Plan: ...\nclass _Plan: ...")
    tree.add("two", "class _Plan: ...")
    assert not list(repeated_class_names(tree.map))
    tree.add("two", "class Plan: ...")
    assert "class Plan is defined more than once" in only(repeated_class_names(tree.map))


def test_a_module_name_used_twice(tree: Tree) -> None:
    tree.add("one/errors")
    tree.add("two/errors")
    tree.add("one/plan")
    assert not list(repeated_module_names(tree.map))
    tree.add("two/plan")
    assert "2 modules are named plan" in only(repeated_module_names(tree.map))


def test_a_small_module_with_one_importer(tree: Tree) -> None:
    tree.add("small", "X = 1\n")
    tree.add("large", "Y = 1\n" * 60)
    tree.add("first", "from sample.small import X\nfrom sample.large import Y\n")
    finding = only(needless_modules(tree.map))
    assert "server/sample/small.py has 1 lines" in finding
    assert "merge it into sample.first" in finding
    tree.add("second", "import sample.small\n")
    assert not list(needless_modules(tree.map))


def test_exceptions_have_a_reason_and_a_need(tree: Tree) -> None:
    name = "server/sample/small.py"
    tree.add("small", "X = 1\n")
    tree.add("first", "from sample.small import X\n")
    tree.list_exception("small_modules", name, "read by people")
    assert not list(needless_modules(tree.map))
    tree.list_exception("small_modules", name, " ")
    assert "without a reason" in only(needless_modules(tree.map))
    tree.list_exception("small_modules", name, "read by people")
    tree.add("first")
    assert "needs no exception any more" in only(needless_modules(tree.map))


USED = """
import enum
from typing import Protocol
from fastapi import APIRouter
from sample.unused import Base

router = APIRouter()

@router.get("/health")
async def health(): ...

class Handler(enum.Enum, Base):
    def emit(self): ...

class Foreign(APIRouter):
    def called_by_its_base(self): ...

def reference_sum(): ...

def launched(): ...

LAUNCHER = "sample.used:launched"
print(Handler, Foreign, Handler.emit)
"""


def test_a_symbol_that_only_tests_use(tree: Tree) -> None:
    tree.add("used", USED)
    tree.add("unused", "class Base: ...")
    (tree.root / "tests" / "test_it.py").write_text("only_tested(); Kept().only_tested_too()")
    assert not list(needless_symbols(tree.map))
    tree.add("unused", "class Base:\n    def f(self): ...\ndef lonely():\n    lonely()\n")
    found = list(needless_symbols(tree.map))
    assert [finding.split()[0] for finding in found] == [
        "sample.unused:Base.f",
        "sample.unused:lonely",
    ]


def test_a_test_folder_named_like_no_package(tree: Tree) -> None:
    tree.add("engine/step")
    for name in ("engine", "sample"):
        (tree.root / "tests" / name).mkdir()
        (tree.root / "tests" / name / "test_it.py").touch()
    assert not list(unmatched_tests(tree.map))
    (tree.root / "tests" / "engine").rename(tree.root / "tests" / "motor")
    assert "tests/motor is named like no package" in only(unmatched_tests(tree.map))


# --- import-linter's contracts ------------------------------------------------------------------


def modules_of_the_contracts() -> set[str]:
    names = set(CONTRACTS["root_packages"])
    for contract in CONTRACTS["contracts"]:
        for key in ("layers", "source_modules", "forbidden_modules", "modules"):
            for entry in contract.get(key, []):
                names.update(name.strip() for name in re.split("[:|]", entry))
    names |= {"quickchange_server.entrypoints.serve", "quickchange_training.demo"}
    return {name for name in names if name.startswith("quickchange_")}


def broken(root: Path, importer: str, imported: str) -> list[str]:
    """The contracts that this import breaks, in a tree of empty modules."""
    for name in modules_of_the_contracts() | {importer}:
        folder = root.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
    for name in ("entrypoints/serve", "cli"):  # the imports that a contract has as exceptions
        known = root / "quickchange_server" / name / "__init__.py"
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text("def demo():\n    import quickchange_training.demo\n")
    with root.joinpath(*importer.split("."), "__init__.py").open("a") as file:
        file.write(f"import {imported}\n")
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(
        [*command, str(REPOSITORY / "pyproject.toml")],
        cwd=root,
        env={"PYTHONPATH": str(root), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if " BROKEN" in line]


def server(name: str) -> str:
    return f"quickchange_server.{name}"


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        (server("engine_client"), server("frontend"), "The API side, from"),
        (server("adapters"), server("spec_decode"), "The engine side, from"),
        (server("api"), server("engine"), "nothing of the engine side"),
        (server("frontend"), "torch", "no torch"),
        (server("engine"), "fastapi", "knows nothing of HTTP"),
        (server("entrypoints"), "ray", "The cluster alone knows Ray"),
        (server("engine_client.client"), server("engine_client.local"), "neither kind of engines"),
        (server("errors"), server("storage"), "import nothing of ours"),
        (server("structured_output"), server("frontend"), "serves both sides"),
        ("quickchange_kernels", "quickchange_store", "stand alone"),
        ("quickchange_store", server("config"), "store import nothing of ours"),
        (server("cli"), "quickchange_bench", "neither training nor benchmarks"),
        ("quickchange_training", server("engine"), "Training imports"),
    ],
)
def test_an_import_that_a_contract_forbids(
    tmp_path: Path, importer: str, imported: str, contract: str
) -> None:
    assert any(contract in line for line in broken(tmp_path, importer, imported))


def test_imports_that_the_contracts_allow(tmp_path: Path) -> None:
    assert not broken(tmp_path, "quickchange_training", server("entrypoints.llm"))
    assert not broken(tmp_path, server("api"), server("frontend"))


@pytest.mark.parametrize(
    "made",
    [
        "torch.tensor([1], device=there)",
        "torch.as_tensor(values, dtype=kind, device=there)",
        "torch.from_numpy(values).to(there)",
    ],
)
def test_a_tensor_of_host_values_made_on_a_device_in_a_step_is_found(tree: Tree, made: str) -> None:
    tree.add("engine/feeding", f"import torch\n\nrows = {made}\n")
    tree.add("loading", f"import torch\n\nrows = {made}\n")
    finding = only(blocking_uploads(tree.map))
    assert "engine/feeding.py:3" in finding
    assert "send it with the step's inputs" in finding


def test_tensors_of_the_host_and_tensors_made_there_are_no_finding(tree: Tree) -> None:
    text = "import torch\n\na = torch.tensor([1])\nb = torch.zeros(3, device=there)\n"
    tree.add("engine/feeding", text)
    assert not [*blocking_uploads(tree.map)]
