"""Quickchange's server: HTTP surfaces, the engine process and what joins the two.

`LLM` and `SamplingParams` are the public Python API. They are imported when they are first used, so
that a module of this package brings in no more than it needs; `__init__.pyi` tells type checkers.
"""

from importlib import import_module

_PUBLIC = {"LLM": "entrypoints.llm", "SamplingParams": "protocol"}

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
