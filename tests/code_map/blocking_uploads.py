"""Tensors that are made on a device of the host's values, by their syntax.

`torch.tensor(values, device=...)` makes the tensor on the host and copies it from memory that is
not pinned: the host waits until all that the device was given before is done.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_MAKERS = ("tensor", "as_tensor", "asarray")
_HOSTS = (*_MAKERS, "from_numpy")
_MOVERS = ("to", "cuda")


def blocking_lines(tree: ast.Module) -> Iterator[int]:
    """Lines of calls that make such a tensor, or move one that they have just made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (_made_there(node) or _moved_there(node)):
            yield node.lineno


def _made_there(call: ast.Call) -> bool:
    return _is_torch(call, _MAKERS) and any(given.arg == "device" for given in call.keywords)


def _moved_there(call: ast.Call) -> bool:
    called = call.func
    if not isinstance(called, ast.Attribute) or called.attr not in _MOVERS:
        return False
    return isinstance(called.value, ast.Call) and _is_torch(called.value, _HOSTS)


def _is_torch(call: ast.Call, names: tuple[str, ...]) -> bool:
    called = call.func
    return (
        isinstance(called, ast.Attribute)
        and called.attr in names
        and isinstance(called.value, ast.Name)
        and called.value.id == "torch"
    )
