"""Fair admission: tokens are shared over compositions, not over requests."""

from __future__ import annotations

from collections import Counter

from quickchange_server.engine.scheduling.fair_queue import FairQueue, cost
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.protocol import Component, SamplingParams, Submit


def waiting(adapter: str, index: int, prompt: int = 50, new: int = 50) -> Sequence:
    return Sequence(
        Submit(
            f"{adapter}-{index}",
            tuple(range(prompt)),
            SamplingParams(max_tokens=new),
            (Component(adapter),),
            seed=0,
        ),
        arrival=float(index),
    )


def serve(queue: FairQueue, count: int, able: str = "") -> list[Sequence]:
    """The next `count` sequences; `able` names the adapters that are on the device."""
    served = []
    for _ in range(count):
        sequence = queue.next(lambda s: not able or s.request.adapters[0].digest in able)
        if sequence is None:
            break
        queue.take(sequence)
        served.append(sequence)
    return served


def test_a_hot_adapter_does_not_starve_a_quiet_one() -> None:
    queue = FairQueue()
    for index in range(500):
        queue.add(waiting("hot", index))
    for index in range(10):
        queue.add(waiting("quiet", index))
    first = Counter(s.request.adapters[0].digest for s in serve(queue, 24))
    assert first["quiet"] == 10


def test_shares_are_counted_in_tokens_not_requests() -> None:
    queue = FairQueue()
    for index in range(200):
        queue.add(waiting("long", index, prompt=400, new=400))
        queue.add(waiting("short", index, prompt=50, new=50))
    tokens = Counter[str]()
    for sequence in serve(queue, 90):
        tokens[sequence.request.adapters[0].digest] += cost(sequence)
    assert 0.8 < tokens["long"] / tokens["short"] < 1.25


def test_requests_of_one_adapter_are_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    for index in range(20):
        queue.add(waiting("a", index))
    assert [s.request_id for s in serve(queue, 20)] == [f"a-{i}" for i in range(20)]


def test_an_adapter_that_is_still_loading_is_passed_over() -> None:
    queue = FairQueue()
    queue.add(waiting("slow", 0))
    for index in range(3):
        queue.add(waiting("fast", index))
    assert [s.request_id for s in serve(queue, 9, able="fast")] == ["fast-0", "fast-1", "fast-2"]
    assert [s.request_id for s in serve(queue, 9)] == ["slow-0"]


def test_asking_again_without_taking_gives_the_same_sequence() -> None:
    queue = FairQueue()
    for name in ("a", "b", "c"):
        queue.add(waiting(name, 0, prompt=1000, new=1000))
    asked = {queue.next(lambda _: True) for _ in range(50)}
    assert len(asked) == 1
