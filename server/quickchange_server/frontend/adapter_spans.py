"""Spans of a text that adapters serve: sums of weighted terms, and where activated adapters begin.

An activated adapter (aLoRA, Greenewald et al. 2025) serves a text from its invocation on: the
tokens that it was trained to be called by, where they stand last in the prompt. Knows digests and
token ids alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from quickchange_server.protocol import Component

Invocations = Mapping[str, tuple[int, ...]]  # tokens that call an activated adapter, by its digest


def summed(terms: Iterable[Component]) -> tuple[Component, ...]:
    """The terms in one form for equal sums, so that equal compositions share cached prefixes.

    Weights of one adapter add up where its spans overlap; spans side by side of equal weights are
    one; what adds up to 0 is left out. Sorted by digest, then by position.
    """
    by_digest: dict[str, list[Component]] = {}
    for term in terms:
        by_digest.setdefault(term.digest, []).append(term)
    return tuple(part for digest in sorted(by_digest) for part in _parts(by_digest[digest]))


def _parts(terms: Sequence[Component]) -> Iterable[Component]:
    """The spans of one adapter's terms, apart from each other."""
    spans = [(term.begin, sys.maxsize if term.end is None else term.end) for term in terms]
    parts: list[Component] = []
    for begin, end in pairwise(sorted({position for span in spans for position in span})):
        weight = 0.0
        for term, (first, last) in zip(terms, spans, strict=True):
            weight += term.weight if first <= begin and end <= last else 0.0
        if weight == 0.0:
            continue
        until = None if end == sys.maxsize else end
        if parts and (parts[-1].end, parts[-1].weight) == (begin, weight):
            parts[-1] = replace(parts[-1], end=until)
        else:
            parts.append(Component(terms[0].digest, weight, begin, until))
    return parts


def activated(
    components: Sequence[Component], invocations: Invocations, prompt: Sequence[int]
) -> tuple[Component, ...]:
    """The components that serve a prompt: what is activated begins at its invocation, and is left
    out where the prompt has none."""
    if not invocations:
        return tuple(components)
    places = {digest: last_place(tokens, prompt) for digest, tokens in invocations.items()}
    return tuple(
        replace(component, begin=max(component.begin, place))
        for component in components
        if (place := places.get(component.digest, 0)) is not None
        and (component.end is None or place < component.end)
    )


def last_place(tokens: Sequence[int], prompt: Sequence[int]) -> int | None:
    """The place in a prompt from which the tokens stand there last; None: nowhere.

    Knuth, Morris and Pratt's search from the end: its time is linear whatever the tokens are.
    """
    wanted = tokens[::-1]
    back = [0] * len(wanted)  # length of the longest border of each beginning of `wanted`
    matched = 0
    for place in range(1, len(wanted)):
        while matched and wanted[place] != wanted[matched]:
            matched = back[matched - 1]
        matched += wanted[place] == wanted[matched]
        back[place] = matched
    matched = 0
    for place in range(len(prompt) - 1, -1, -1):
        while matched and prompt[place] != wanted[matched]:
            matched = back[matched - 1]
        matched += prompt[place] == wanted[matched]
        if matched == len(wanted):
            return place
    return None
