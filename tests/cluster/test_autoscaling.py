"""The number of engines that are wanted, by what is queued and by the KV cache in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickchange_server.cluster.autoscaling import EnginesWanted


def context(queues: list[float], kv: list[float], waiting: float = 0.0) -> Any:
    metrics = {
        "queue": {f"replica-{n}": value for n, value in enumerate(queues)},
        "kv_share": {f"replica-{n}": value for n, value in enumerate(kv)},
    }
    return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=waiting)


@pytest.mark.parametrize(
    ("queues", "kv", "waiting", "wanted"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, 1),  # one is left
        ([10.0, 10.0], [0.1, 0.1], 0.0, 2),
        ([10.5, 10.0], [0.1, 0.1], 0.0, 3),
        ([1.0, 1.0], [0.8, 0.81], 0.0, 3),  # the KV cache alone
        ([10.0, 10.0], [0.0, 0.0], 25.0, 5),  # what waits at the ingresses counts
    ],
)
def test_as_many_engines_are_wanted_as_keep_each_at_its_target(
    queues: list[float], kv: list[float], waiting: float, wanted: int
) -> None:
    assert EnginesWanted(10, 0.8)(context(queues, kv, waiting)) == (wanted, {})


def test_before_engines_have_told_anything_one_is_wanted() -> None:
    silent = SimpleNamespace(aggregated_metrics=None, total_queued_requests=None)
    assert EnginesWanted(10, 0.8)(silent) == (1, {})


@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 1)), min_size=1, max_size=20),
    st.floats(0, 1000),
)
def test_with_the_wanted_engines_none_is_above_its_target(
    engines: list[tuple[float, float]], waiting: float
) -> None:
    queues, kv = [q for q, _ in engines], [k for _, k in engines]
    wanted, _ = EnginesWanted(16, 0.8)(context(queues, kv, waiting))
    assert (sum(queues) + waiting) / wanted <= 16 * (1 + 1e-9)
    assert sum(kv) / wanted <= 0.8 * (1 + 1e-9)
