"""Ranks up to which updates are served, and what the factors of higher ones leave out.

A change of a module's weight is factored exactly where its rank is within the limit, and on request
to the nearest of a given rank, with the error stated. Knows nothing of formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.low_rank import Factors, exact_factors, nearest_factors

if TYPE_CHECKING:
    import torch

MAX_RANK = 1 << 16
EXACT_RANK = 256  # a module's rank up to which an update is served exactly
APPROXIMATE_REMEDY = (
    "add it with --approximate-rank N (`approximate_rank` in Python), which serves the nearest "
    "update of rank N and states its error"
)


@dataclass(frozen=True, slots=True)
class RankLimits:
    """The ranks that are served: exactly up to `exact`, above it as `approximate` says.

    approximate: the rank of the nearest update, where an approximation is asked for.
    """

    exact: int = EXACT_RANK
    approximate: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("exact_rank", self.exact), ("approximate_rank", self.approximate)):
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_RANK):
                raise InvalidAdapterError(
                    f"{value!r} is no rank",
                    key=name,
                    remedy=f"give a whole number from 1 to {MAX_RANK}",
                )


EXACT_ONLY = RankLimits()


@dataclass
class Factoring:
    """The factors of one adapter's changes, and what approximations left out of them."""

    limits: RankLimits
    _left: float = 0.0  # sums of squares
    _whole: float = 0.0
    _worst: tuple[float, str] = (0.0, "")
    _approximated: list[str] = field(default_factory=list)  # modules

    def factors(self, module: str, matrix: torch.Tensor, field: str) -> Factors:
        """Factors of the change [out, in] of a module's weight, float64.

        field: of the configuration, which asks for the change. Raises UnsupportedFeatureError where
        the rank is above the limit and no approximation is asked for.
        """
        found = exact_factors(matrix, self.limits.exact)
        if found is None and self.limits.approximate is None:
            raise UnsupportedFeatureError(
                f"the update of {module} has a rank above {self.limits.exact}, up to which updates "
                "are served exactly",
                file=CONFIG_FILE,
                key=field,
                remedy=f"raise --exact-rank (`exact_rank` in Python), or {APPROXIMATE_REMEDY}",
            )
        if found is None and self.limits.approximate is not None:
            found = nearest_factors(matrix, self.limits.approximate)
            self._approximated.append(module)
        assert found is not None
        self._left += found.error**2
        self._whole += found.norm**2
        if found.norm:
            self._worst = max(self._worst, (found.error / found.norm, module))
        return found

    def stated(self, *, always: bool = False) -> dict[str, Any]:
        """The field of an adapter's source that says what was approximated, if anything was.

        always: approximations were asked for, though there may have been none.
        """
        if self.limits.approximate is None or not (self._approximated or always):
            return {}
        stated = {
            "rank": self.limits.approximate,
            "modules": len(self._approximated),
            "relative_error": math.sqrt(self._left / self._whole) if self._whole else 0.0,
            "worst_relative_error": self._worst[0],
            "worst_module": self._worst[1],
        }
        return {"approximation": stated}
