"""Measures of the code's map, each with its target: `make map` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import request_path
from checks import CodeMap
from repeated_names import repeated_basenames, repeated_classes
from request_path import RequestPath
from source_tree import SourceTree

SAMPLING_FILTER = "typical_p"  # stands for any filter: where it is named, a new one must be


@dataclass(frozen=True)
class Measure:
    """`target` is the most that is allowed; None where the number is only told."""

    name: str
    value: int
    target: int | None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "ok" if self.value <= self.target else "over"


def measures(code: CodeMap, path: RequestPath) -> Iterator[Measure]:
    source = code.source
    fullest, size = code.folder_sizes.most_common(1)[0]
    root = "server/quickchange_server"
    cyclic = [unit for group in code.folder_imports.cycles() for unit in group]
    filter_files = files_naming(source, SAMPLING_FILTER)
    yield Measure("modules in the fullest folder", size, 12, fullest)
    yield Measure("modules in the server's root", code.folder_sizes[root], 5)
    yield Measure(
        "folders and top modules in an import cycle",
        len(cyclic),
        0,
        f"of {len(code.folder_imports.edges)}",
    )
    yield Measure("files from route to kernel", len(path.files), 11)
    yield Measure("asynchronous layers a streamed token passes", path.layers, 3)
    yield Measure("public class names defined more than once", len(repeated_classes(source)), 0)
    yield Measure("basenames used more than once", len(repeated_basenames(source)), 0)
    yield Measure("files to touch for a new sampling filter", len(filter_files), 6)
    yield Measure("lines outside tests", lines(source), None)
    yield Measure("of them lines of Python", sum(module.lines for module in source.modules), None)


def lines(source: SourceTree) -> int:
    """Lines of code outside tests, in Python and C++."""
    native = sum(path.read_text().count("\n") for path in source.native_files())
    return native + sum(module.lines for module in source.modules)


def files_naming(source: SourceTree, word: str) -> list[Path]:
    """Files of code outside tests in which `word` occurs; a docstring or comment counts too."""
    modules = [module.path for module in source.modules if word in module.text]
    native = [path for path in source.native_files() if word in path.read_text()]
    return [*modules, *(path.relative_to(source.root) for path in native)]


def main() -> None:
    code = CodeMap(SourceTree.read())
    path = request_path.trace()
    print(f"{'measure':46}{'value':>8}{'target':>8}")
    for measure in measures(code, path):
        target = "" if measure.target is None else f"≤ {measure.target}"
        line = (
            f"{measure.name:46}{measure.value:8,}{target:>8}  {measure.verdict:5}{measure.detail}"
        )
        print(line.rstrip())
    _tell("from the route to the kernel", path.files)
    _tell("what a streamed token passes, from outside", path.asynchronous)
    _tell(f"a sampling filter ({SAMPLING_FILTER})", files_naming(code.source, SAMPLING_FILTER))


def _tell(title: str, entries: list[str] | list[Path]) -> None:
    print(f"\n{title}:", *entries, sep="\n  ")


if __name__ == "__main__":
    main()
