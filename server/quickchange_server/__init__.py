"""Quickchange's server: HTTP surfaces, the engine process, and the public Python API.

`LLM` and `SamplingParams`, the Python API, are imported at their first use, so that importing a
module of this package loads no more than it needs. `__init__.pyi` declares them to type checkers.
"""

from importlib import import_module

_PUBLIC = {"LLM": "entrypoints.llm", "SamplingParams": "protocol"}

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
