"""Layout of variants over the hash range 0 .. SIZE - 1, changed with the least movement.

A unit is a fixed point of the range; a variant owns pieces of it in proportion to its share. When
weights change, shrinking variants give up the far ends of their pieces and growing ones take
exactly those, so the part that changes owner is the total variation distance of the shares, the
least possible. (Weighted rendezvous hashing moves more if several weights change at once.)
Restoring earlier weights restores the earlier layout. A layout depends on its history, so it is
stored, not recomputed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise

SIZE = 2**32

Layout = tuple[tuple[int, str], ...]  # (end of a piece, its variant), ends ascending to SIZE
Piece = tuple[int, int, str]  # first point, end, variant


def shares(layout: Layout) -> dict[str, int]:
    """Number of points of each variant that has any."""
    sizes: dict[str, int] = {}
    start = 0
    for end, variant in layout:
        sizes[variant] = sizes.get(variant, 0) + end - start
        start = end
    return sizes


def owner(layout: Layout, point: int) -> str:
    """The variant that owns a point."""
    return layout[bisect_right(layout, point, key=lambda piece: piece[0])][1]


def divided(weights: Mapping[str, float]) -> Layout:
    """A first layout, in the order of the variants."""
    end, made = 0, []
    for variant, size in _sizes(weights).items():
        if size:
            end += size
            made.append((end, variant))
    return tuple(made)


def moved(history: Sequence[Layout], weights: Mapping[str, float]) -> Layout:
    """The layout for `weights` that changes the last one of `history` least; an earlier one is
    reused if it changes no more."""
    layout, wanted = history[-1], _sizes(weights)
    kept, freed = _shrunk(layout, wanted)
    fewest = sum(end - start for start, end, _ in freed)
    for earlier in reversed(history):
        if shares(earlier) == _positive(wanted) and _apart(layout, earlier) == fewest:
            return earlier
    missing = _positive(wanted)
    for start, end, variant in kept:
        missing[variant] -= end - start
    return _joined([*kept, *_handed_out(freed, missing)])


def pieces(layout: Layout) -> list[Piece]:
    ends = [end for end, _ in layout]
    return [(start, end, v) for start, (end, v) in zip([0, *ends], layout, strict=False)]


def _positive(sizes: Mapping[str, int]) -> dict[str, int]:
    return {variant: size for variant, size in sizes.items() if size > 0}


def _apart(one: Layout, other: Layout) -> int:
    """Number of points whose owner differs."""
    cuts = sorted({0, *(end for end, _ in one), *(end for end, _ in other)})
    return sum(
        end - start for start, end in pairwise(cuts) if owner(one, start) != owner(other, start)
    )


def _sizes(weights: Mapping[str, float]) -> dict[str, int]:
    """Points of each variant, SIZE in total, by the largest remainder method."""
    total = sum(weights.values())
    exact = {variant: weight / total * SIZE for variant, weight in weights.items()}
    sizes = {variant: int(size) for variant, size in exact.items()}
    by_remainder = sorted((v for v in exact if weights[v] > 0), key=lambda v: sizes[v] - exact[v])
    for variant in by_remainder[: SIZE - sum(sizes.values())]:
        sizes[variant] += 1
    return sizes


def _shrunk(layout: Layout, wanted: Mapping[str, int]) -> tuple[list[Piece], list[Piece]]:
    """The pieces that keep their owner, and those that are given up."""
    room = dict(wanted)
    kept, freed = [], []
    for start, end, variant in pieces(layout):
        left = room.get(variant, 0)
        cut = start + min(end - start, left)
        room[variant] = left - (cut - start)
        if cut > start:
            kept.append((start, cut, variant))
        if end > cut:
            freed.append((cut, end, variant))
    return kept, freed


def _handed_out(freed: Iterable[Piece], missing: dict[str, int]) -> list[Piece]:
    taken = []
    for first, end, _ in freed:
        start = first
        while start < end:
            variant = next(variant for variant, size in missing.items() if size > 0)
            cut = min(end, start + missing[variant])
            missing[variant] -= cut - start
            taken.append((start, cut, variant))
            start = cut
    return taken


def _joined(scattered: Iterable[Piece]) -> Layout:
    runs = groupby(sorted(scattered), key=lambda piece: piece[2])
    return tuple((list(run)[-1][1], variant) for variant, run in runs)
