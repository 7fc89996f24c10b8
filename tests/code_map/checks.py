"""What keeps the map of the code: each check gives its findings, each of which says what to do.

`make lint` runs this file; it exits with 1 where anything is found. Exceptions stand in
pyproject.toml, in tables below `[tool.quickchange]`, each with its reason; an exception that
nothing needs any more is a finding too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from blocking_uploads import blocking_lines
from folder_imports import FolderImports, import_graph
from grimp import ImportGraph
from repeated_names import repeated_basenames, repeated_classes
from small_modules import SMALL_LINES, small_modules
from source_tree import SourceTree
from unused_symbols import unused_symbols

FOLDER_LIMIT = 12
LIMITS = {"server/quickchange_server": 5}  # folders with a limit of their own
IMPORTS_SHOWN = 12
STEP_FOLDERS = ("engine", "spec_decode")  # whose code runs in the engine's steps,
_MODEL = Path("server/quickchange_server/model")  # as does the model's: what loads it lies below


class CodeMap:
    """A source tree with its imports, which several checks share."""

    def __init__(self, source: SourceTree) -> None:
        self.source = source

    @cached_property
    def graph(self) -> ImportGraph:
        return import_graph(self.source)

    @cached_property
    def folder_imports(self) -> FolderImports:
        return FolderImports.of(self.graph)

    @cached_property
    def folder_sizes(self) -> Counter[str]:
        """Modules in each folder of a package; `__init__` and `__main__` aside."""
        return Counter(str(m.folder) for m in self.source.modules if m.is_named)


def full_folders(code: CodeMap) -> Iterator[str]:
    for folder, size in sorted(code.folder_sizes.items()):
        limit = LIMITS.get(folder, FOLDER_LIMIT)
        if size > limit:
            yield f"{folder} has {size} modules, at most {limit} are allowed: split it by subject"


def folder_cycles(code: CodeMap) -> Iterator[str]:
    for group in code.folder_imports.cycles():
        edges = list(code.folder_imports.within(group))
        imports = [one for _, _, found in edges for one in found]
        shown = "".join(f"\n    {one}" for one in imports[:IMPORTS_SHOWN])
        more = len(imports) - IMPORTS_SHOWN
        rest = f"\n    and {more} more" if more > 0 else ""
        yield (
            f"{', '.join(group)} import one another: turn one direction round, by moving what both "
            f"need to the lower one (the fewest imports first){shown}{rest}"
        )


def repeated_class_names(code: CodeMap) -> Iterator[str]:
    for name, places in repeated_classes(code.source).items():
        yield f"class {name} is defined more than once ({', '.join(places)}): rename all but one"


def repeated_module_names(code: CodeMap) -> Iterator[str]:
    for name, places in repeated_basenames(code.source).items():
        yield f"{len(places)} modules are named {name} ({', '.join(places)}): rename all but one"


def needless_modules(code: CodeMap) -> Iterator[str]:
    found = {
        str(small.module.path): (
            f"{small.module.path} has {small.module.lines} lines, under {SMALL_LINES}, and one "
            f"importer: merge it into {small.importer}"
        )
        for small in small_modules(code.source, code.graph)
    }
    yield from _unlisted(code, "small_modules", found)


def needless_symbols(code: CodeMap) -> Iterator[str]:
    found = {
        name: f"{name} is used by nothing outside tests: remove it, or move it to tests/support"
        for name in unused_symbols(code.source)
    }
    yield from _unlisted(code, "symbols_used_from_outside", found)


def blocking_uploads(code: CodeMap) -> Iterator[str]:
    """Tensors of host values made on a device, for whose copy the host waits."""
    for module in code.source.modules:
        if module.folder == _MODEL or any(part in module.folder.parts for part in STEP_FOLDERS):
            for line in blocking_lines(module.tree):
                yield (
                    f"{module.path}:{line} makes a tensor of host values on a device, and waits "
                    "for its copy: make it on the host and send it with the step's inputs (upload)"
                )


def unmatched_tests(code: CodeMap) -> Iterator[str]:
    """Folders of tests that are named like no package."""
    folders = {
        part.removeprefix("quickchange_")
        for module in code.source.modules
        for part in module.folder.parts
    }
    tests = sorted(path for path in (code.source.root / "tests").iterdir() if _is_tests(path))
    found = {
        path.name: f"tests/{path.name} is named like no package: name it after what it tests"
        for path in tests
        if path.name not in folders
    }
    yield from _unlisted(code, "test_folders", found)


def _is_tests(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.py"))


def _unlisted(code: CodeMap, table: str, found: dict[str, str]) -> Iterator[str]:
    """What is found and not in the table of exceptions, and what is in the table needlessly."""
    place = f"[tool.quickchange.{table}] in pyproject.toml"
    listed = code.source.table(table)
    for name, message in found.items():
        if name not in listed:
            yield f"{message}, or list it with a reason under {place}"
        elif not listed[name].strip():
            yield f"{name} is listed without a reason under {place}: give one"
    for name in listed:
        if name not in found:
            yield f"{name} needs no exception any more: remove it from {place}"


Check = Callable[[CodeMap], Iterable[str]]
CHECKS: tuple[Check, ...] = (
    full_folders,
    folder_cycles,
    repeated_class_names,
    repeated_module_names,
    needless_modules,
    needless_symbols,
    unmatched_tests,
    blocking_uploads,
)


def main() -> int:
    code = CodeMap(SourceTree.read())
    findings = [finding for check in CHECKS for finding in check(code)]
    for finding in findings:
        print(finding)
    print(f"the code's map: {len(findings) or 'no'} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
