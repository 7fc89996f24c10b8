"""The size of a regular expression with its counted repetitions written out."""

from __future__ import annotations

import re

LARGEST = 1 << 16  # characters and classes
TOO_LARGE = (
    f"repeats so much that it is over {LARGEST} characters long when written out; repeat less"
)

_ATOM = re.compile(
    r"\\[pPxu]\{[^}]*\}"  # a class or a character by its name
    r"|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]"  # an escape, a class in brackets
    r"|\{(?P<least>\d+)(?P<open>,(?P<most>\d*))?\}"
    r"|.",
    re.DOTALL,
)


def written_out(pattern: str) -> int:
    """Characters and classes of the expression with each repetition written out; at least that of
    any expression that compiles, for `x{n,}` as for `x{n}`."""
    sizes = [0]  # of the groups that are open
    last = 0  # of the atom that a repetition would repeat
    for found in _ATOM.finditer(pattern):
        atom = found.group()
        if found["least"] is not None:
            times = int((found["most"] or found["least"])[:12])
            sizes[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
        elif atom == "(":
            sizes.append(0)
        elif atom == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif atom not in "?*+|^$":
            last = 1
            sizes[-1] += 1
    return sum(sizes)
