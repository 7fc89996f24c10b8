"""Adapters' copies beside running steps: nothing is overwritten while a step may read it, and
nothing is published before it has arrived.

The device is simulated: each stream is a list of work that runs when the test lets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from quickchange_server.adapters.adapter_loader import (
    ImmediateCopies,
    Mark,
    StreamCopies,
    copies_for,
)
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import AdapterImage, build_image, page_shapes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
WIDTH = 32
GROUPS = [ModuleGroup(0, "linear", WIDTH, WIDTH, (Member("m", 0, WIDTH),))]


class FakeCuda:
    """The part of torch.cuda that copies use, on queues whose work waits until it is let run."""

    def __init__(self) -> None:
        self.steps = FakeStream("steps")
        self.current = self.steps
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        assert device == CUDA
        return FakeStream("copies")

    def Event(self, blocking: bool = False) -> FakeEvent:  # noqa: N802
        return FakeEvent(self, blocking)

    def current_stream(self, device: torch.device) -> FakeStream:
        assert device == CUDA
        return self.current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device == CUDA
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def give(self, name: str) -> None:
        """One piece of work for the current stream."""
        self.current.queue.append(lambda: self.log.append(name))


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[Callable[[], None] | FakeEvent] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.queue.append(event)

    def drain(self) -> None:
        """Run all that was given, and what it waits for elsewhere first."""
        while self.queue:
            work = self.queue.pop(0)
            if isinstance(work, FakeEvent):
                work.reach()
            else:
                work()


class FakeEvent:
    def __init__(self, cuda: FakeCuda, blocking: bool) -> None:
        self._cuda = cuda
        self.blocking = blocking
        self._stream: FakeStream | None = None
        self._ahead = 0

    def record(self, stream: FakeStream) -> None:
        self._stream, self._ahead = stream, len(stream.queue)

    def reach(self) -> None:
        assert self._stream is not None, "an event that was never recorded"
        ahead, self._stream.queue = (
            self._stream.queue[: self._ahead],
            self._stream.queue[self._ahead :],
        )
        for work in ahead:
            work.reach() if isinstance(work, FakeEvent) else work()
        self._ahead = 0

    def synchronize(self) -> None:
        assert self.blocking, "the thread would spin on a core that the engine needs"
        self.reach()


def test_a_copy_runs_behind_the_steps_given_before_its_mark_and_not_behind_later_ones() -> None:
    cuda = FakeCuda()
    copies = StreamCopies(CUDA, cuda)
    cuda.give("step that reads the old pages")
    after = copies.mark()
    cuda.give("later step")
    copies.run(after, lambda: cuda.give("copy"))
    assert cuda.log == ["step that reads the old pages", "copy"]


def test_a_copy_has_arrived_when_run_returns() -> None:
    cuda = FakeCuda()
    copies = StreamCopies(CUDA, cuda)

    def copy() -> None:
        cuda.give("first")
        cuda.give("second")

    copies.run(copies.mark(), copy)
    assert cuda.log == ["first", "second"]
    assert not cuda.steps.queue, "the steps' stream was made to wait"


def test_copies_leave_the_thread_on_its_own_stream() -> None:
    cuda = FakeCuda()
    copies = StreamCopies(CUDA, cuda)
    copies.run(copies.mark(), lambda: None)
    assert cuda.current is cuda.steps


def test_a_cpu_copies_at_once() -> None:
    copies = copies_for(CPU)
    done: list[str] = []
    copies.run(copies.mark(), lambda: done.append("copy"))
    assert isinstance(copies, ImmediateCopies)
    assert done == ["copy"]


class RecordingCopies:
    """Says in which order a pool marks and copies."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def mark(self) -> Mark:
        self.log.append("mark")
        return len(self.log)

    def run(self, after: Mark, copy: Callable[[], None]) -> None:
        self.log.append(f"copy after {after}")
        copy()


def make_image(value: float) -> AdapterImage:
    update = LowRankUpdate(torch.full((8, WIDTH), value), torch.full((WIDTH, 8), value), 1.0)
    adapter = CanonicalAdapter("L", "base", {"m": update})
    return build_image(adapter, page_shapes(GROUPS, torch.float32), torch.float32)


@pytest.fixture
def pool() -> tuple[DevicePool, RecordingCopies]:
    copies = RecordingCopies()
    page = 2 * 8 * WIDTH * 4
    return DevicePool(GROUPS, page, torch.float32, CPU, copies), copies


def test_pages_given_anew_are_marked_after_they_were_freed(
    pool: tuple[DevicePool, RecordingCopies],
) -> None:
    adapters, copies = pool
    old, new = make_image(1.0), make_image(2.0)
    slot = adapters.allocate(old)
    assert slot is not None
    adapters.write(slot, old)
    adapters.publish(slot)
    copies.log.append("freed")
    adapters.free(slot)
    again = adapters.allocate(new)
    assert again is not None
    adapters.write(again, new)
    assert copies.log == ["mark", "copy after 1", "freed", "mark", "copy after 4"]


def test_a_slot_is_invisible_until_its_copy_is_done_and_it_is_published(
    pool: tuple[DevicePool, RecordingCopies],
) -> None:
    adapters, _ = pool
    image = make_image(3.0)
    slot = adapters.allocate(image)
    assert slot is not None
    assert not adapters.tables.directory[slot].any()
    adapters.write(slot, image)
    assert not adapters.tables.directory[slot].any()
    adapters.publish(slot)
    assert adapters.tables.directory[slot].any()
    assert (adapters.tables.arena == 3.0).all()
