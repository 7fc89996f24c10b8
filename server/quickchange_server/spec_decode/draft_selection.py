"""Which drafts are worth a row, over the whole batch: those that bring most tokens a second.

A draft costs what its row adds to the step and brings a token with the chance that it and all
before it hold. For any number of rows the best drafts are those of the highest such chances, and as
no draft has a higher one than the draft it follows, they are whole beginnings of chains. What is
left is how many: rows are nearly free up to a point and dear beyond, so every number is looked at.
Knows nothing of tokens: chances in, counts out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from quickchange_server.spec_decode.cost_model import StepCost


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes beside drafts."""

    decoding: int  # sequences that get a certain token from one row each
    prefill: int  # rows of prefill
    cap: int  # draft rows there is room for


@dataclass(frozen=True, slots=True)
class Purchase:
    """The drafts to verify in a step."""

    lengths: tuple[int, ...]  # how many of each chain, from its beginning
    gain: float  # tokens they are expected to bring


def buy_chains(
    chains: Sequence[Sequence[float]], load: StepLoad, cost: StepCost, *, trial: int | None = None
) -> Purchase:
    """The drafts that make the decode work's tokens a second most; of equals, the fewest.

    chains: of each sequence its drafts' chances, each given those before. trial: the sequence whose
    drafts are bought whatever they are worth, as far as the cap goes.
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
    """That drafts of these chances bring, each given those before, if all are verified."""
    path, tokens = 1.0, 0.0
    for chance in chain:
        path *= chance
        tokens += path
    return tokens
