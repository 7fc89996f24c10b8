"""Imports between modules and folders; those in functions and for type checkers count too.

A folder is one unit. A module at the top of a package (`cli`, `errors`) is a unit of its own: the
command line stands above every folder, the errors below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from grimp import ImportGraph, build_graph
from source_tree import SourceTree


@dataclass(frozen=True)
class FolderImports:
    """For each unit, the units that it imports, each with the imports in question."""

    edges: Mapping[str, Mapping[str, tuple[str, ...]]]

    @classmethod
    def of(cls, graph: ImportGraph) -> FolderImports:
        edges: dict[str, dict[str, list[str]]] = {}
        packages = {module for module in graph.modules if graph.find_children(module)}
        for importer in sorted(graph.modules):
            own = edges.setdefault(unit(importer, packages), {})
            for imported in sorted(graph.find_modules_directly_imported_by(importer)):
                if unit(imported, packages) != unit(importer, packages):
                    own.setdefault(unit(imported, packages), []).append(f"{importer} → {imported}")
        return cls({a: {b: tuple(v) for b, v in others.items()} for a, others in edges.items()})

    def cycles(self) -> list[list[str]]:
        """Groups of units that import one another, however far round."""
        reached = {start: self._reached(start) for start in self.edges}
        groups = {
            tuple(sorted(other for other in reached[start] if start in reached[other]))
            for start in self.edges
            if start in reached[start]
        }
        return [list(group) for group in sorted(groups)]

    def within(self, group: list[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """The imports that make a cycle, fewest first: those are the ones to turn round."""
        found = [
            (importer, imported, imports)
            for importer in group
            for imported, imports in self.edges[importer].items()
            if imported in group
        ]
        return iter(sorted(found, key=lambda edge: (len(edge[2]), edge)))

    def _reached(self, start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(self.edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(self.edges.get(name, ()))
        return seen


def unit(module: str, packages: set[str]) -> str:
    """The folder that holds a module, or the module itself at the top of its package."""
    if module in packages or module.count(".") < 2:
        return module
    return module.rpartition(".")[0]


def import_graph(source: SourceTree) -> ImportGraph:
    """All imports among the packages of `source`, from its files and no others of those names."""
    packages = source.packages
    with _first_on_path([str(folder) for folder in packages.values()]):
        return build_graph(
            *packages,
            include_external_packages=False,
            exclude_type_checking_imports=False,
            cache_dir=None,
        )


@contextmanager
def _first_on_path(folders: list[str]) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = before
