"""Modules and folders of the code outside tests, as syntax trees. Imports none of them."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("server", "kernels", "adapters_store", "benchmarks")
NATIVE_SUFFIXES = (".h", ".cpp")


@dataclass(frozen=True)
class Module:
    """A Python file: `name` is dotted, `path` relative to the repository."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def is_named(self) -> bool:
        """False for `__init__` and `__main__`, which Python names."""
        return not self.path.name.startswith("__")


@dataclass(frozen=True)
class SourceTree:
    """The code below `root`; `tables` are pyproject's `[tool.quickchange]`."""

    root: Path
    modules: tuple[Module, ...]
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    scripts: Iterable[str] = ()

    @classmethod
    def read(cls, root: Path = REPOSITORY) -> SourceTree:
        pyproject = _pyproject(root)
        return cls(
            root,
            tuple(_modules(root)),
            pyproject.get("tool", {}).get("quickchange", {}),
            tuple(pyproject.get("project", {}).get("scripts", {}).values()),
        )

    @property
    def packages(self) -> dict[str, Path]:
        """Import packages at the top, with the source root that holds each."""
        tops = (path for name in SOURCE_ROOTS for path in (self.root / name).glob("*/__init__.py"))
        return {top.parent.name: top.parent.parent for top in sorted(tops)}

    def table(self, name: str) -> Mapping[str, str]:
        """Exceptions to a check: what is excepted, and the reason."""
        return self.tables.get(name, {})

    def native_files(self) -> list[Path]:
        return [path for path in _files(self.root) if path.suffix in NATIVE_SUFFIXES]


def _pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def _files(root: Path) -> list[Path]:
    found = (path for name in SOURCE_ROOTS for path in sorted((root / name).rglob("*")))
    return [path for path in found if path.is_file()]


def _modules(root: Path) -> Iterable[Module]:
    for source_root in SOURCE_ROOTS:
        for path in sorted((root / source_root).rglob("*.py")):
            dotted = path.relative_to(root / source_root).with_suffix("").parts
            name = ".".join(part for part in dotted if part != "__init__")
            yield Module(name, path.relative_to(root), path.read_text())
