"""Names of adapters and aliases, and the references that requests use.

A name is one or more segments joined by "/", each `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. A reference
is `NAME`, `NAME@3` (a version's number), `NAME@3f9a1c` (the start of a version's digest, 6 or more
hexadecimal digits) or an alias. Names are never used as file names: a name can't leave the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from quickchange_store.errors import InvalidNameError

MAX_LENGTH = 256
MIN_DIGEST_PREFIX = 6
# Words with a meaning of their own in a request's `model` or `turbo`.
RESERVED = frozenset({"auto", "base", "lookup", "none", "off"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})*")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_DIGEST_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_DIGEST_PREFIX},64}}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. A selector of decimal digits may be a number or a digest's start."""

    name: str
    selector: str | None = None  # a version's number, or the start of a digest in lower case

    @property
    def number(self) -> int | None:
        """The version number that the selector may mean."""
        if self.selector is None or _NUMBER.fullmatch(self.selector) is None:
            return None
        return int(self.selector)

    @property
    def digest_prefix(self) -> str | None:
        """The digest prefix that the selector may mean."""
        if self.selector is None or _DIGEST_PREFIX.fullmatch(self.selector) is None:
            return None
        return self.selector

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"


def check_name(name: str, *, what: str = "name") -> str:
    """Return `name` where it may name an adapter or an alias, else raise InvalidNameError."""
    if len(name) > MAX_LENGTH or _NAME.fullmatch(name) is None:
        raise InvalidNameError(
            f"{_shown(name)} is not a valid {what}",
            key=what,
            remedy="use letters, digits, '.', '_' and '-', beginning with a letter or a digit, at "
            f"most 128 in a segment and {MAX_LENGTH} in all, segments joined by '/'",
        )
    if name.lower() in RESERVED:
        raise InvalidNameError(
            f"{name!r} is reserved", key=what, remedy="choose another; reserved are " + _reserved()
        )
    return name


def parse_reference(text: str) -> Reference:
    """Parse `NAME`, `NAME@NUMBER`, `NAME@DIGESTPREFIX` or an alias. Raises InvalidNameError."""
    name, at, selector = text.partition("@")
    check_name(name)
    reference = Reference(name, selector.lower() if at else None)
    if at and reference.number is None and reference.digest_prefix is None:
        raise InvalidNameError(
            f"{_shown(selector)} is not a version",
            key="version",
            remedy=f"give a version's number, or {MIN_DIGEST_PREFIX} or more hexadecimal digits of "
            "its digest",
        )
    return reference


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _reserved() -> str:
    return ", ".join(sorted(RESERVED))


def close_matches(name: str, known: Iterable[str]) -> list[str]:
    """Known names that are spelled much like this one, the likeliest first."""
    if len(name) > MAX_LENGTH:
        return []
    folded = {each.casefold(): each for each in known}
    return [folded[each] for each in get_close_matches(name.casefold(), folded, cutoff=0.75)]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question after the known name that is spelled most like this one, else `otherwise`."""
    near = close_matches(name, known)
    return f"did you mean {near[0]!r}?" if near else otherwise
