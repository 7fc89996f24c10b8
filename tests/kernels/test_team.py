"""The threads that share the native operations' work: in children, side by side, on fewer cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from quickchange_kernels import native
from quickchange_kernels.linear.linear_float import linear

assert native.ensure()

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(4096, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_forked_child_has_a_team_of_its_own() -> None:
    right = linear(X, WEIGHT)
    child = os.fork()
    if child == 0:
        same = torch.equal(linear(X, WEIGHT), right)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_threads_that_come_while_the_team_works_do_their_own() -> None:
    right = linear(X, WEIGHT)
    wrong: list[int] = []

    def work(number: int) -> None:
        results = [torch.equal(linear(X, WEIGHT), right) for _ in range(200)]
        wrong.extend([number] * results.count(False))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_are_the_same_on_one_core() -> None:
    right = linear(X, WEIGHT)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert torch.equal(linear(X, WEIGHT), right)
    finally:
        os.sched_setaffinity(0, allowed)
