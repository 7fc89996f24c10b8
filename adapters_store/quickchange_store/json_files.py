"""JSON that may hold anything: read within limits, or refused by the place of the fault.

What is returned is plain data that can be written again and shown: no number outside float64, no
integer of more than 64 bits (it becomes a float), no key twice in one object, no text that UTF-8
can't hold, and no more than MAX_DEPTH levels, so that no reader of it recurses too deep.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_DEPTH = 64  # objects and lists in one another
_EXACT_DIGITS = 18  # every whole number of so many digits is one of 64 bits
_TOO_DEEP = f"objects and lists are more than {MAX_DEPTH} levels deep"

_Place = tuple[Any, object] | None  # a value's key, behind the place of what holds it


class UnreadableFileError(ValueError):
    """The file or its content can't be used: `problem`, and `key` where a place is at fault."""

    def __init__(self, problem: str, key: str | None = None) -> None:
        self.problem = problem
        self.key = key
        super().__init__(problem if key is None else f"{key}: {problem}")


def read_file(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises UnreadableFileError.

    Folders, pipes and devices are refused, and never waited for.
    """
    try:
        descriptor = open_to_read(path)
        try:
            return read_opened(descriptor, limit)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableFileError(f"it can't be read: {error.strerror or error}") from error


def open_to_read(path: Path) -> int:
    """A descriptor of whatever is at `path`. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def read_opened(descriptor: int, limit: int) -> bytes:
    """All of an open plain file of at most `limit` bytes. Raises UnreadableFileError, OSError."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFileError("it is no plain file")
    if status.st_size > limit:
        raise UnreadableFileError(f"it has {status.st_size} bytes, more than {limit}")
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(limit)


def read_object(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`. Raises UnreadableFileError."""
    try:
        text = content.decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"it is no UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UnreadableFileError(f"it is no JSON: {error}") from error
    except RecursionError as error:
        raise UnreadableFileError(_TOO_DEEP) from error
    if not isinstance(tree, dict):
        raise UnreadableFileError("it is no JSON object")
    _check(tree)
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UnreadableFileError("the key is there twice in one object", _shown(twice))
    return made


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _EXACT_DIGITS else float(digits)


def _check(tree: dict[str, Any]) -> None:
    left: list[tuple[_Place, Any, int]] = [(None, tree, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise UnreadableFileError(_TOO_DEEP, _path(place))
        if isinstance(value, float) and not math.isfinite(value):
            raise UnreadableFileError("the number is not finite, or too large", _path(place))
        if isinstance(value, str):
            _check_text(value, place)
        elif isinstance(value, dict):
            for key, inner in value.items():
                _check_text(key, place)
                left.append(((place, key), inner, depth + 1))
        elif isinstance(value, list):
            left += [((place, number), inner, depth + 1) for number, inner in enumerate(value)]


def _check_text(text: str, place: _Place) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UnreadableFileError("the text is no valid Unicode", _path(place)) from error


def _path(place: _Place) -> str | None:
    """The keys down to a value, joined by dots; the outermost where there are many."""
    keys: list[str] = []
    while place is not None:
        place, key = place
        keys.append(_shown(str(key)))
    return ".".join(keys[::-1][:8]) or None


def _shown(text: str) -> str:
    return ascii(text)[1:-1][:80]
