"""Public functions, classes and methods that no code outside tests uses.

A name counts as used where any other code outside tests says it, whatever it then stands for: the
check misses some unused symbols, and doesn't name used ones. Not looked at: `reference_*`, which
tests and benchmarks compare with; what a decorator registers (routes, commands, validators); and
methods of classes with a base that isn't ours, which that base calls.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from source_tree import Module, SourceTree

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# Decorators that change what they decorate and register it nowhere.
_REGISTERING_NOTHING = frozenset(
    [
        "property",
        "setter",
        "cached_property",
        "staticmethod",
        "classmethod",
        "abstractmethod",
        "dataclass",
        "cache",
        "lru_cache",
        "contextmanager",
        "asynccontextmanager",
        "inference_mode",
        "jit",
    ]
)
# Bases that call no method of their subclasses by name.
_CALLING_NOTHING = frozenset(
    [
        "Protocol",
        "Generic",
        "NamedTuple",
        "Enum",
        "StrEnum",
        "ABC",
        "BaseModel",
        "BaseSettings",
        "Exception",
        "ValueError",
        "RuntimeError",
    ]
)


@dataclass(frozen=True)
class Symbol:
    """`name` is `module:function` or `module:Class.method`."""

    name: str
    node: Definition

    @property
    def is_looked_at(self) -> bool:
        word = self.node.name
        decorators = {_last_word(decorator) for decorator in self.node.decorator_list}
        return not word.startswith(("_", "reference_")) and decorators <= _REGISTERING_NOTHING


def unused_symbols(source: SourceTree) -> list[str]:
    """The symbols as `module:Class.method`, without regard to the table of exceptions."""
    uses = Counter(script.rpartition(":")[2] for script in source.scripts)
    for module in source.modules:
        uses += _uses(module.tree)
    return [
        symbol.name
        for symbol in _symbols(source)
        if symbol.is_looked_at and uses[symbol.node.name] == _uses(symbol.node)[symbol.node.name]
    ]


def _symbols(source: SourceTree) -> Iterator[Symbol]:
    bases = _bases(source)
    for module in source.modules:
        yield from _symbols_of(module, bases)


def _symbols_of(module: Module, bases: dict[str, set[str]]) -> Iterator[Symbol]:
    for node in module.tree.body:
        if not isinstance(node, _DEFINITIONS):
            continue
        yield Symbol(f"{module.name}:{node.name}", node)
        if isinstance(node, ast.ClassDef) and not _has_foreign_base(node.name, bases):
            for inner in node.body:
                if isinstance(inner, _DEFINITIONS):
                    yield Symbol(f"{module.name}:{node.name}.{inner.name}", inner)


def _uses(tree: ast.AST) -> Counter[str]:
    """Words that say something defined elsewhere. An import alone uses nothing."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word):
                found[word] += 1
            case ast.alias(name=word, asname=str()):
                found[word.rpartition(".")[2]] += 1
            case ast.Constant(value=str(text)):  # getattr, quoted annotations, "module:function"
                found[text.rpartition(":")[2]] += 1
    return found


def _bases(source: SourceTree) -> dict[str, set[str]]:
    """The bases of each class of ours, by name; classes named alike share theirs."""
    ours = tuple(source.packages)
    bases: dict[str, set[str]] = {}
    for module in source.modules:
        foreign = _foreign_names(module.tree, ours)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                words = {_base_word(base, foreign) for base in node.bases}
                bases.setdefault(node.name, set()).update(words)
    return bases


def _foreign_names(tree: ast.Module, ours: tuple[str, ...]) -> set[str]:
    """Names that a module imports from packages which aren't ours."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ours
        for alias in node.names
    }


def _base_word(base: ast.expr, foreign: set[str]) -> str:
    """The name of a base class, with a dot before it where it isn't ours."""
    word = _last_word(base)
    inner = base.value if isinstance(base, ast.Subscript) else base
    is_foreign = isinstance(inner, ast.Attribute) or word in foreign
    return f".{word}" if is_foreign and word not in _CALLING_NOTHING else word


def _has_foreign_base(name: str, bases: dict[str, set[str]]) -> bool:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        base = waiting.pop()
        if base not in bases and base not in _CALLING_NOTHING:
            return True
        if base not in seen:
            seen.add(base)
            waiting.extend(bases.get(base, ()))
    return False


def _last_word(node: ast.expr) -> str:
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word):
            return word
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return _last_word(inner)
    return ""
