"""Draft depths: how deep each sequence's heads should draft for the next step, decided beforehand.

Drafting takes time even if its drafts are not bought; under load, with drafts that are seldom
accepted, it must not be done at all. What will be offered is not known yet: each drafter is taken
to offer what it did lately. Knows nothing of tokens: chances in, depths out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quickchange_server.spec_decode.acceptance_rates import DEEPEST, Acceptance, Drafter
from quickchange_server.spec_decode.cost_model import DraftCost, StepCost
from quickchange_server.spec_decode.draft_selection import StepLoad, expected_tokens

REPLAN = 4  # steps for which a first plan holds, and each later one a step longer, up to …
SETTLED = 32  # … so many: what is learned changes ever less
_ROUNDS = 3  # each squares the distance to the best rate


@dataclass(frozen=True, slots=True)
class Prospect:
    """Drafts that one decoding sequence may have in the next step."""

    known: Sequence[float]  # chances of its drafts without heads, each given those before
    drafter: Drafter | None = None  # its heads
    deepest: int = 0  # most drafts that its heads may give


class DepthPlan:
    """Draft depths of a batch, planned anew every few steps and whenever the batch changes."""

    def __init__(self, acceptance: Acceptance, cost: StepCost, drafting: DraftCost) -> None:
        self._acceptance = acceptance
        self._cost = cost
        self._drafting = drafting
        self._orders: dict[Drafter, _Order] = {}
        self._batch: Counter[Drafter | None] = Counter()
        self._age = 0
        self._plans = 0

    def depths(self, prospects: Sequence[Prospect], load: StepLoad) -> tuple[int, ...]:
        """Depth to which each decoding sequence's heads should draft; 0: not at all."""
        batch = Counter(prospect.drafter for prospect in prospects)
        self._age += 1
        if batch != self._batch or self._age >= min(REPLAN + self._plans - 1, SETTLED):
            self._orders = self._ordered(prospects, load)
            self._plans += 1
            self._batch, self._age = batch, 0
        if load.cap <= 0:
            return (0,) * len(prospects)
        return tuple(self._depth(prospect) for prospect in prospects)

    def _depth(self, prospect: Prospect) -> int:
        order = None if prospect.drafter is None else self._orders.get(prospect.drafter)
        if order is None or expected_tokens(prospect.known) >= order.promise:
            return 0
        return min(order.depth, prospect.deepest)

    def _ordered(self, prospects: Sequence[Prospect], load: StepLoad) -> dict[Drafter, _Order]:
        """Orders to the drafters; empty if no sequence gains by heads.

        The best rate (tokens a second, drafting included) is found as Dinkelbach does (1967): take
        a second to be worth the rate reached so far, choose what then gains most, and again from
        the rate that this gives; it only rises, from that of not drafting at all.
        """
        groups = _groups(prospects, self._acceptance)
        if not groups:
            return {}
        hopes = _Hopes.of(prospects, groups)
        chosen = [0] * len(groups)
        rate = hopes.best_rate(chosen, load, self._cost, 0.0)
        for _ in range(_ROUNDS):
            levels = hopes.levels(rate, groups, load, self._cost, self._drafting)
            wanted = [
                min(level, prospects[member].deepest)
                for level, group in zip(levels, groups, strict=True)
                for member in group.members
            ]
            reached = hopes.best_rate(levels, load, self._cost, self._drafting.seconds(wanted))
            if reached <= rate:
                break
            chosen, rate = levels, reached
        return {
            group.drafter: _Order(depth, group.promise)
            for group, depth in zip(groups, chosen, strict=True)
        }


class _Order(NamedTuple):
    """Depth that a drafter should draft to."""

    depth: int
    promise: float  # expected tokens of a chain; a sequence with more without heads needs none


@dataclass(frozen=True, slots=True)
class _Group:
    """The sequences of one drafter to which its heads promise more than they have without."""

    drafter: Drafter
    members: list[int]
    promise: float  # expected tokens of a chain
    paths: NDArray[np.float64]  # [offers, depths] chance of each draft with all before it


def _groups(prospects: Sequence[Prospect], acceptance: Acceptance) -> list[_Group]:
    able: dict[Drafter, list[int]] = {}
    for index, prospect in enumerate(prospects):
        if prospect.drafter is not None and prospect.deepest:
            able.setdefault(prospect.drafter, []).append(index)
    groups = []
    for drafter, indices in able.items():
        deepest = min(max(prospects[index].deepest for index in indices), DEEPEST)
        paths = acceptance.expected(drafter, deepest).cumprod(axis=1)
        promise = float(paths.sum()) / len(paths)
        members = [i for i in indices if expected_tokens(prospects[i].known) < promise]
        if members:
            groups.append(_Group(drafter, members, promise, paths))
    return groups


@dataclass(frozen=True, slots=True)
class _Hopes:
    """Expected drafts, the likeliest first; each counts for a part of a row.

    A sequence in a group has either what its heads give down to some depth, or what it has without.
    """

    path: NDArray[np.float64]  # [N] chance of each with all before it
    rows: NDArray[np.float64]  # [N] rows of the kind
    depth: NDArray[np.int64]  # [N] depth from 1; 0: drafts without heads
    group: NDArray[np.int64]  # [N] index of the sequence's group; len(groups): in none

    @classmethod
    def of(cls, prospects: Sequence[Prospect], groups: Sequence[_Group]) -> _Hopes:
        belongs = {member: at for at, group in enumerate(groups) for member in group.members}
        known = [np.cumprod(prospect.known) for prospect in prospects]
        path = np.concatenate([*(group.paths.ravel() for group in groups), *known])
        sizes = [*(group.paths.size for group in groups), *map(len, known)]
        shares = [len(group.members) / len(group.paths) for group in groups]
        owners = [belongs.get(index, len(groups)) for index in range(len(prospects))]
        depth = np.zeros(len(path), int)
        heads_given = [np.tile(np.arange(1, w + 1), n) for n, w in (g.paths.shape for g in groups)]
        depth[: sum(map(len, heads_given))] = np.concatenate(heads_given)
        order = np.argsort(-path, kind="stable")
        return cls(
            path=path[order],
            rows=np.repeat([*shares, *(1.0 for _ in known)], sizes)[order],
            depth=depth[order],
            group=np.repeat([*range(len(groups)), *owners], sizes)[order],
        )

    def best_rate(
        self, levels: Sequence[int], load: StepLoad, cost: StepCost, drafting: float
    ) -> float:
        """Best tokens a second if the groups draft to `levels` in `drafting` seconds."""
        level = np.array([*levels, 0])[self.group]
        among = (self.depth <= level) & ((self.depth > 0) | (level == 0))
        gains, _, seconds = self._bought(among, load, cost)
        return float(((load.decoding + gains) / (seconds + drafting)).max())

    def levels(
        self,
        rate: float,
        groups: Sequence[_Group],
        load: StepLoad,
        cost: StepCost,
        drafting: DraftCost,
    ) -> list[int]:
        """The depth for each group that gains most if a second is worth `rate` tokens.

        Rows are taken at the mean price of all that are then worth theirs.
        """
        gains, rows, seconds = self._bought(np.ones(len(self.path), bool), load, cost)
        count = int(np.argmax(gains - rate * seconds))
        if not count:
            return [0] * len(groups)
        price = (seconds[count] - seconds[0]) / rows[count]
        worth = self.rows[:count] * (self.path[:count] - rate * price)
        most = max(group.paths.shape[1] for group in groups)
        cell = self.group[:count] * (most + 1) + self.depth[:count]
        net = np.bincount(cell, worth, (len(groups) + 1) * (most + 1)).reshape(-1, most + 1)[:-1]
        members = np.array([len(group.members) for group in groups])
        everyone = int(members.sum())
        passes = np.array([drafting.seconds([depth] * everyone) for depth in range(most + 1)])
        total = net - rate * np.outer(members / everyone, np.diff(passes, prepend=0.0))
        total[:, 1:] = total[:, 1:].cumsum(axis=1)
        best: list[int] = total.argmax(axis=1).tolist()
        return best

    def _bought(
        self, among: NDArray[np.bool_], load: StepLoad, cost: StepCost
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Tokens gained, rows and seconds with the first 0, 1, … of the drafts in `among`."""
        share = self.rows[among]
        rows = np.concatenate(((0.0,), share.cumsum()))
        within = rows <= load.cap
        gains = np.concatenate(((0.0,), (share * self.path[among]).cumsum()))[within]
        rows = rows[within]
        base = load.decoding + load.prefill
        table = cost.table(base + int(rows[-1]) + 1)
        at = np.interp(base + rows, np.arange(len(table)), table)
        return gains, rows, table[load.decoding] + at - table[base]
