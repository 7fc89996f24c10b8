"""A composition under a name: the versions whose weighted sum an adapter is.

It has no tensors: its terms name other versions by their digests, so equal terms under two names
are on the device once. Names that the terms were given by are informal and not here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:  # names and digests are useful without torch
    import torch

MAX_TERMS = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Term:
    """An adapter version, its weight, and the positions of the text that it serves: from `begin`
    on and before `end`, to the text's end if that is None. Raises InvalidAdapterError."""

    digest: str
    weight: float = 1.0
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        last = math.inf if self.end is None else self.end
        if not math.isfinite(self.weight) or not 0 <= self.begin < last:
            raise InvalidAdapterError(
                f"a term with the weight {self.weight} from position {self.begin} to {self.end}",
                key=self.digest,
                remedy="give a finite weight, and an end behind the begin, which is 0 or more",
            )

    def within(self, weight: float, begin: int, end: int | None) -> Term | None:
        """The term at a weight, in the positions from `begin` to `end` that it is for; None if
        there are none."""
        ends = [each for each in (end, self.end) if each is not None]
        begin, last = max(begin, self.begin), min(ends, default=None)
        if last is not None and last <= begin:
            return None
        return Term(self.digest, weight * self.weight, begin, last)


@dataclass(frozen=True)
class Composition:
    """Σ weightᵢ · adapterᵢ over the positions that each term serves. Raises InvalidAdapterError."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        named = all(_DIGEST.fullmatch(term.digest) for term in self.terms)
        if not named or not 1 <= len(self.terms) <= MAX_TERMS:
            raise InvalidAdapterError(
                f"a composition of {len(self.terms)} terms, or one that names no version",
                key="terms",
                remedy=f"compose 1 to {MAX_TERMS} adapters",
            )

    def encode(self) -> list[list[Any]]:
        ordered = sorted(self.terms, key=lambda t: (t.digest, t.begin, t.end or 0, t.weight))
        return [[term.digest, term.weight, term.begin, term.end] for term in ordered]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {}
