"""Recorded tasks made up: outputs in which heads' drafts hold at a known rate."""

from __future__ import annotations

import random
from collections.abc import Callable

from quickchange_bench.engine.draft_recording import (
    HeadNode,
    MachinePrices,
    RecordedTask,
    RecordedText,
)
from quickchange_server.spec_decode.prompt_lookup import TokenText

HEADS = 6
WRONG = 10**6  # a token that no output has
Confidence = Callable[[random.Random], tuple[float, float]]

NO_TEXT = TokenText(lambda _: "?", lambda _: ())  # words that are never found


def recorded_task(
    confidence: Confidence, *, texts: int = 16, length: int = 40, seed: int = 0
) -> RecordedTask:
    """confidence: draws what a head says of a draft, and the chance that it holds."""
    chance = random.Random(seed)
    made = []
    for number in range(texts):
        # no token twice: lookup finds nothing
        output = tuple(range(1000 * number + 1, 1000 * number + length + 1))
        drafts = [_nodes(output[at + 1 :], confidence, chance) for at in range(length)]
        made.append(RecordedText((1000 * number,), output, tuple(drafts)))
    return RecordedTask("made up", False, HEADS, frozenset(), tuple(made))


def _nodes(
    rest: tuple[int, ...], confidence: Confidence, chance: random.Random
) -> dict[tuple[int, ...], HeadNode]:
    nodes: dict[tuple[int, ...], HeadNode] = {}
    path: tuple[int, ...] = ()
    for depth in range(HEADS):
        said, held = confidence(chance)
        right = depth < len(rest) and chance.random() < held and path == rest[:depth]
        token = rest[depth] if right else WRONG
        nodes[path] = HeadNode(token, said, None, 0)
        path = (*path, token)
    return nodes


def linear_prices(base: float, row: float, head_pass: float = 1e-4) -> MachinePrices:
    """Steps of `base` seconds and `row` for each row."""
    steps = tuple([(rows, base + row * rows) for rows in (1, 8, 64, 512)])
    return MachinePrices(steps, ((1, head_pass), (32, 3 * head_pass)))
