"""What the engine asks of a grammar library: compiled constraints, and masks over token ids.

Knows neither the engine nor a library; `constraints.grammars` is the one that serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from quickchange_server.protocol import Constraint


class Matcher(Protocol):
    """How far a constrained text has come in its grammar."""

    @property
    def error(self) -> str | None:
        """Why it can't go on: a limit of the library, met on the way."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        ...

    def copy(self) -> Matcher: ...

    def advance(self, token: int) -> None:
        """Go on by a token that was allowed."""
        ...

    def forced(self) -> list[int]:
        """Text that must follow, as the tokenizer spells it. Other spellings are allowed, too."""
        ...

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, one after the other, may follow; the end is the last."""
        ...


M = TypeVar("M", bound=Matcher)


@dataclass(frozen=True, slots=True)
class Masked(Generic[M]):
    """The masks that one sequence needs: of its next token, and behind each of its drafts."""

    matcher: M
    row: int  # of the first mask; the others follow
    drafts: tuple[int, ...]


class ConstraintCompiler(Protocol):
    """What the engine needs of a library for grammars."""

    ends: frozenset[int]  # the model's end-of-sequence ids

    def compile(self, constraint: Constraint) -> Matcher:
        """On the compile thread. Raises ConstraintError."""
        ...

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        """Write the masks [rows, words], as token_mask.py has them. The end ids are allowed where
        the grammar accepts. Behind a draft that the grammar forbids, or that ends it, rows stay as
        they are: they are never read. Matchers stay where they are."""
        ...
