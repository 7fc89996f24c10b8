"""Selection of the drafts to verify over the whole batch: those that bring most tokens a second.

A draft costs what its row adds to the step and brings a token with the chance that it and all
before it are accepted. For any number of rows the best drafts are those of the highest such
chances, and as no draft has a higher one than the draft it follows, they are whole beginnings of
chains. What is left is how many: rows are nearly free up to a point and dear beyond, so every
number is looked at. Knows nothing of tokens: chances in, counts out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quickchange_server.spec_decode.cost_model import StepCost


@dataclass(frozen=True, slots=True)
class StepLoad:
    """Rows of a step beside drafts."""

    decoding: int  # sequences that get a certain token from one row each
    prefill: int  # rows of prefill
    cap: int  # room for draft rows


@dataclass(frozen=True, slots=True)
class Purchase:
    """The drafts to verify in a step."""

    lengths: tuple[int, ...]  # drafts of each chain, from its beginning
    gain: float  # expected tokens


def buy_chains(
    chains: Sequence[Sequence[float]], load: StepLoad, cost: StepCost, *, trial: int | None = None
) -> Purchase:
    """Buy the drafts that maximise decoding's tokens a second; of equals, the fewest.

    chains: chances of each sequence's drafts, each given those before. trial: the sequence whose
    drafts are bought at any cost, up to the cap.
    """
    paths: list[float] = []  # chance of each with all before it
    owners: list[int] = []
    for sequence, chain in enumerate(chains):
        path = 1.0
        for held in chain:
            path *= held
            paths.append(path)
            owners.append(sequence)
    if not paths or load.cap <= 0:
        return Purchase((0,) * len(chains), 0.0)
    chance, owner = np.array(paths), np.array(owners)
    tried = np.zeros(len(owner), bool) if trial is None else owner == trial
    # Stable: of equal chances the earlier goes first, hence a draft before its successor.
    order = np.argsort(np.where(tried, -2.0, -chance), kind="stable")[: load.cap]
    gains = np.concatenate(((0.0,), np.cumsum(chance[order])))
    base = load.decoding + load.prefill
    table = cost.table(base + len(order))
    seconds = table[load.decoding] + table[base:] - table[base]
    least = int(tried[order].sum())
    counted = load.decoding + gains[least:]
    count = least + int(np.argmax(counted / seconds[least:]))
    lengths = np.bincount(owner[order[:count]], minlength=len(chains))
    return Purchase(tuple(lengths.tolist()), float(gains[count]))


def expected_tokens(chain: Iterable[float]) -> float:
    """Expected tokens of a verified chain. chain: chances, each given those before."""
    path, tokens = 1.0, 0.0
    for chance in chain:
        path *= chance
        tokens += path
    return tokens
