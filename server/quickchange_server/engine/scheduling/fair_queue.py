"""Fair order of the sequences that wait to run: preempted ones first, then the new ones.

New sequences are served by deficit round robin over compositions (Shreedhar and Varghese, 1996),
counted in tokens. Each composition has its own queue. In turn, each queue's credit grows by a
quantum and its head is served while the credit covers its cost, so that a hot adapter with a
thousand requests gets no more tokens than a quiet one with ten. Requests under different salts are
different compositions here, so that salted tenants share a popular adapter evenly. A queue whose
head can't be served yet (its adapter is still loading) is passed over at no cost to anyone. Knows
nothing of KV blocks.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from quickchange_server.engine.scheduling.sequence import Sequence

QUANTUM = 256  # tokens of credit per turn


@dataclass
class _Queue:
    waiting: deque[Sequence] = field(default_factory=deque)
    credit: int = 0


def cost(sequence: Sequence) -> int:
    """Tokens that serving a sequence may take: left to compute and to generate."""
    left = sequence.request.sampling.token_limit - sequence.output_length
    return len(sequence.tokens) + max(left, 0)


class FairQueue:
    """New sequences in fair order. The queue at the front of `_queues` has the turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[bytes, _Queue] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.waiting

    def add(self, sequence: Sequence) -> None:
        self._queues.setdefault(sequence.key, _Queue()).waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence without a charge."""
        self._queues[sequence.key].waiting.remove(sequence)
        self._drop_if_empty(sequence.key)

    def heads(self) -> list[Sequence]:
        """The first sequence of each queue."""
        return [queue.waiting[0] for queue in self._queues.values()]

    def next(self, servable: Callable[[Sequence], bool]) -> Sequence | None:
        """The next sequence in fair order whose `servable` is true; None if no queue's head is.

        It stays queued until `take`.
        """
        able = [key for key, queue in self._queues.items() if servable(queue.waiting[0])]
        if not able:
            return None
        # Rounds in which nobody could be served are granted at once.
        rounds = min(self._rounds_short(key) for key in able)
        for key in able:
            self._queues[key].credit += max(rounds - 1, 0) * QUANTUM
        for key in able:
            queue = self._queues[key]
            if self._rounds_short(key) > 0:
                queue.credit += QUANTUM
            if self._rounds_short(key) == 0:
                self._queues.move_to_end(key, last=False)
                return queue.waiting[0]
            self._queues.move_to_end(key)
        raise RuntimeError("after the granted rounds, one head's credit covers its cost")

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence that `next` returned and charge its queue."""
        queue = self._queues[sequence.key]
        queue.credit -= cost(sequence)
        queue.waiting.popleft()
        if queue.waiting and self._rounds_short(sequence.key) > 0:
            self._queues.move_to_end(sequence.key)  # its turn is over
        self._drop_if_empty(sequence.key)

    def _rounds_short(self, key: bytes) -> int:
        queue = self._queues[key]
        return max(-(-(cost(queue.waiting[0]) - queue.credit) // QUANTUM), 0)

    def _drop_if_empty(self, key: bytes) -> None:
        if not self._queues[key].waiting:
            del self._queues[key]  # and with it the credit: an idle adapter saves up nothing


class Lane:
    """The sequences of one priority that are not running.

    The preempted come first, in order of arrival, then the waiting in fair order.
    """

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []
        self.waiting = FairQueue()

    def __len__(self) -> int:
        return len(self.preempted) + len(self.waiting)

    def __bool__(self) -> bool:
        return bool(self.preempted or self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.preempted
        yield from self.waiting

    def candidates(self) -> list[Sequence]:
        """Sequences that may be next, once they can be served."""
        return [*self.preempted, *self.waiting.heads()]

    def next(self, servable: Callable[[Sequence], bool]) -> Sequence | None:
        """The next servable sequence, which stays here until `take`; None if there is none."""
        again = next((sequence for sequence in self.preempted if servable(sequence)), None)
        return self.waiting.next(servable) if again is None else again

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence that `next` returned."""
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.waiting.take(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a running sequence that was preempted."""
        insort(self.preempted, sequence, key=lambda s: s.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, preempted or waiting."""
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.waiting.remove(sequence)
