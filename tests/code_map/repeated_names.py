"""Names that say two things: classes and modules that are named alike."""

from __future__ import annotations

import ast
from collections import defaultdict

from source_tree import SourceTree

# A folder is expected to have its own; its path says whose it is.
REPEATABLE = frozenset({"cli", "errors", "routes", "requests", "responses"})


def repeated_classes(source: SourceTree) -> dict[str, list[str]]:
    """Public classes defined more than once, each with the files that define it."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for module in source.modules:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{module.path}:{node.lineno}")
    return _more_than_once(places)


def repeated_basenames(source: SourceTree) -> dict[str, list[str]]:
    """Basenames of modules used more than once, each with its files."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for module in source.modules:
        if module.is_named and module.path.stem not in REPEATABLE:
            places[module.path.stem].append(str(module.path))
    return _more_than_once(places)


def _more_than_once(places: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}
