"""Protocols for a grammar library: compiled constraints, and masks over token ids.

Neither the engine nor a library is known here; `grammar` implements these by llguidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from quickchange_server.protocol import Constraint


class Matcher(Protocol):
    """The state of a constrained text in its grammar."""

    @property
    def error(self) -> str | None:
        """The library's limit that stops the text from continuing, or None."""
        ...

    @property
    def complete(self) -> bool:
        """True if only the end may follow."""
        ...

    def copy(self) -> Matcher: ...

    def advance(self, token: int) -> None:
        """Advance by an allowed token."""
        ...

    def forced(self) -> list[int]:
        """Tokens of the text that must follow. Other tokenizations of it are allowed too."""
        ...

    def allowed(self, tokens: Sequence[int]) -> int:
        """Length of the longest allowed prefix of `tokens`; nothing is allowed after the end."""
        ...


M = TypeVar("M", bound=Matcher)


@dataclass(frozen=True, slots=True)
class Masked(Generic[M]):
    """A sequence's rows in the mask: one for its next token, and one after each of its drafts."""

    matcher: M
    row: int  # row of the first mask; the others follow
    drafts: tuple[int, ...]


class ConstraintCompiler(Protocol):
    """A grammar library, as the engine uses it."""

    ends: frozenset[int]  # the model's end-of-sequence ids

    def compile(self, constraint: Constraint) -> Matcher:
        """Compile a constraint, on the compile thread. Raises ConstraintError."""
        ...

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        """Write the masks, int32 [rows, words], one bit for each token id (see token_mask.py).

        The end ids are allowed where the grammar accepts. Rows after a draft that the grammar
        forbids, or that ends the text, are left as they are, since they are never read. Matchers
        do not advance.
        """
        ...
