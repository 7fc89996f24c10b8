"""Time limit for the regular expressions in an adapter's configuration.

Python's `re` can take hours over a short expression such as `(a+)+$`, can't be interrupted, and an
adapter may come from anyone who can upload. So expressions are first run over the base's module
paths in a process of their own that is ended after a time limit; only then here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from quickchange_store.errors import InvalidAdapterError

LIMIT_SECONDS = 2.0

# The child sees nothing but expressions and paths; an expression that does not compile is left for
# the caller, who names its field.
_CHILD = """
import json, re, sys
expressions, paths = json.load(sys.stdin)
for expression in expressions:
    try:
        compiled = re.compile(expression)
    except re.error:
        continue
    for path in paths:
        compiled.fullmatch(path)
        compiled.match(path)
"""

_PLAIN = re.compile(r"[\w.]*", re.ASCII)


def check_patterns(config: Mapping[str, Any], paths: Iterable[str], file: str) -> None:
    """Raise InvalidAdapterError where the configuration's expressions take too long over `paths`.

    Costs the start of a process, and that only where there are expressions beyond plain names.
    """
    expressions = [as_used for text, as_used in _expressions(config) if not _PLAIN.fullmatch(text)]
    if not expressions:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([expressions, list(paths)]).encode(),
            timeout=LIMIT_SECONDS,
            capture_output=True,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise InvalidAdapterError(
            f"a regular expression takes more than {LIMIT_SECONDS:g} s or too much memory over the "
            "base model's module names",
            file=file,
            key="target_modules, exclude_modules, feedforward_modules, layers_pattern, "
            "rank_pattern, alpha_pattern",
            remedy="simplify it, or list the modules by name",
        ) from error


def _expressions(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of each expression as written and as PEFT uses it."""
    fields = ("target_modules", "exclude_modules", "feedforward_modules")
    names = [config.get(field) for field in fields]
    layers = config.get("layers_pattern")
    layers = layers if isinstance(layers, list) else [layers]
    keys = [
        key
        for name in ("rank_pattern", "alpha_pattern")
        if isinstance(config.get(name), dict)
        for key in config[name]
    ]
    return [
        *((text, text) for text in names if isinstance(text, str)),
        *((t, rf"(?:^|.*?\.){t}\.(?P<idx>\d+)\.") for t in layers if isinstance(t, str)),
        *((text, rf"(.*\.)?({text})$") for text in keys),
    ]
