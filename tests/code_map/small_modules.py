"""Small modules that one other imports: they save nobody a look, and cost a file to open."""

from __future__ import annotations

from dataclasses import dataclass

from grimp import ImportGraph
from source_tree import Module, SourceTree

SMALL_LINES = 60


@dataclass(frozen=True)
class SmallModule:
    module: Module
    importer: str


def small_modules(source: SourceTree, graph: ImportGraph) -> list[SmallModule]:
    """Modules under 60 lines with exactly one importer, without regard to the exceptions."""
    return [
        SmallModule(module, *importers)
        for module in source.modules
        if module.is_named and module.lines < SMALL_LINES and module.name in graph.modules
        if len(importers := graph.find_modules_that_directly_import(module.name)) == 1
    ]
