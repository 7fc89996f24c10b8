"""Allocator of pages of several sizes in one span. Numbers only: no tensors, no adapters.

The span is cut in equal slabs. A slab is given to one page size when a page of that size is needed,
and is free for any size again when its last page is freed. One pool for each size would have to
divide the budget ahead of time by a guess: adapters on the attention projections of SmolLM2 alone
could use just 38 % of an evenly divided one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_PAGES_PER_SLAB = 8  # at least, so that at most an eighth of a slab is lost at its end
_SLABS_PER_SIZE = 8  # at least, so that at most an eighth of the span lies in slabs not yet full


def slab_size(page_sizes: Iterable[int], span: int, preferred: int) -> int:
    """Slab size for these page sizes in a span: `preferred`, or what the sizes need."""
    sizes = set(page_sizes)
    largest = max(sizes)
    roomy = max(preferred, _PAGES_PER_SLAB * largest)
    return max(largest, min(roomy, span // (_SLABS_PER_SIZE * len(sizes))))


@dataclass(frozen=True, slots=True)
class Grant:
    """Pages given to one owner."""

    pages: Mapping[int, Sequence[int]]  # page size -> offsets, ascending
    slabs: Mapping[int, int]  # slab number -> pages of the grant in it


@dataclass(slots=True)
class _Slab:
    """A slab in use: its page size and the offsets of its free pages, the lowest last."""

    page_size: int
    free: list[int]


class SlabAllocator:
    """Allocator of pages in [0, span). Offsets and sizes are in any one unit."""

    def __init__(self, span: int, slab: int) -> None:
        self._slab = slab
        self._count = span // slab
        self._empty = list(range(self._count - 1, -1, -1))
        self._slabs: dict[int, _Slab] = {}  # in use, by number
        self.used = 0  # total size of the pages in use

    def allocate(self, demand: Mapping[int, int]) -> Grant | None:
        """Pages for `demand` (page size -> number); None if there is no room."""
        spare: Counter[int] = Counter()
        for slab in self._slabs.values():
            spare[slab.page_size] += len(slab.free)
        if self._slabs_needed(demand, spare) > len(self._empty):
            return None
        pages = {size: sorted(self._take(size, count)) for size, count in demand.items()}
        numbers = Counter(at // self._slab for offsets in pages.values() for at in offsets)
        self.used += sum(size * count for size, count in demand.items())
        return Grant(pages, numbers)

    def free(self, grant: Grant) -> None:
        """Give the pages of a grant back."""
        for size, offsets in grant.pages.items():
            self.used -= size * len(offsets)
            for offset in offsets:
                self._slabs[offset // self._slab].free.append(offset)
        for number in grant.slabs:
            slab = self._slabs[number]
            slab.free.sort(reverse=True)
            if len(slab.free) == self._slab // slab.page_size:
                del self._slabs[number]
                self._empty.append(number)

    def fits(self, demand: Mapping[int, int], kept: Iterable[Grant]) -> bool:
        """True if `demand` (page size -> number) has room beside the pages of `kept` alone."""
        taken: Counter[int] = Counter()  # slab number -> pages
        for grant in kept:
            taken.update(grant.slabs)
        spare: Counter[int] = Counter()  # page size -> free pages in slabs that stay in use
        for number, pages in taken.items():
            size = self._slabs[number].page_size
            spare[size] += self._slab // size - pages
        return self._slabs_needed(demand, spare) <= self._count - len(taken)

    def check_integrity(self, grants: Iterable[Grant]) -> None:
        """Raises AssertionError if pages overlap, leave their slab or are in none of `grants`."""
        assert sorted([*self._slabs, *self._empty]) == list(range(self._count)), "a slab is lost"
        by_slab: dict[int, list[int]] = {number: [] for number in self._slabs}
        used = 0
        for grant in grants:
            for size, offsets in grant.pages.items():
                used += size * len(offsets)
                for offset in offsets:
                    number = offset // self._slab
                    assert self._slabs[number].page_size == size, "a page in another size's slab"
                    by_slab[number].append(offset)
        assert used == self.used, "the used size is wrong"
        for number, slab in self._slabs.items():
            assert by_slab[number], "a slab without a page in use is not empty"
            expected = self._pages_of(number, slab.page_size)
            assert sorted([*by_slab[number], *slab.free]) == expected, "a page is lost or shared"
            assert slab.free == sorted(slab.free, reverse=True), "free pages out of order"

    def _slabs_needed(self, demand: Mapping[int, int], spare: Mapping[int, int]) -> int:
        """Empty slabs that `demand` takes beside the spare pages (page size -> number).

        Returns more slabs than exist if a page is larger than a slab.
        """
        if any(size > self._slab for size in demand):
            return self._count + 1
        needed = 0
        for size, count in demand.items():
            needed += -(-max(count - spare.get(size, 0), 0) // (self._slab // size))
        return needed

    def _take(self, size: int, count: int) -> list[int]:
        """Take pages from the fullest slabs, so that the others have a chance to become empty."""
        partial = [slab for slab in self._slabs.values() if slab.page_size == size and slab.free]
        partial.sort(key=lambda slab: len(slab.free), reverse=True)  # taken from the end
        taken: list[int] = []
        while len(taken) < count:
            if not partial:
                number = self._empty.pop()
                self._slabs[number] = _Slab(size, self._pages_of(number, size)[::-1])
                partial.append(self._slabs[number])
            free = partial.pop().free
            split = max(len(free) - (count - len(taken)), 0)
            taken += free[split:]
            del free[split:]
        return taken

    def _pages_of(self, number: int, size: int) -> list[int]:
        begin = number * self._slab
        return [begin + i * size for i in range(self._slab // size)]


class RunAllocator:
    """First-fit allocator of runs of numbers in [0, capacity)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (begin, end)

    def allocate(self, count: int) -> int | None:
        """Take a run of `count` numbers and return its first; None if no free run is as long."""
        if not count:
            return 0
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= count:
                rest = (begin + count, end)
                self._free[index : index + 1] = [rest] if rest[0] < end else []
                return begin
        return None

    def close_up(self, used: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Move all used runs (begin, end) to the front, in order; returns where they lie then."""
        ends = list(accumulate(end - begin for begin, end in used))
        last = ends[-1] if ends else 0
        self._free = [(last, self.capacity)] if last < self.capacity else []
        return [(end - (old[1] - old[0]), end) for end, old in zip(ends, used, strict=True)]

    def free(self, begin: int, count: int) -> None:
        """Give [begin, begin + count) back, joined with its free neighbours."""
        if not count:
            return
        runs = sorted([*self._free, (begin, begin + count)])
        self._free = runs[:1]
        for run in runs[1:]:
            last_begin, last_end = self._free[-1]
            if run[0] == last_end:
                self._free[-1] = (last_begin, run[1])
            else:
                self._free.append(run)

    def check_integrity(self, used: Iterable[tuple[int, int]]) -> None:
        """Raises AssertionError unless the `used` runs (begin, end) and the free ones tile all."""
        runs = sorted([*self._free, *(run for run in used if run[0] < run[1])])
        ends = [0, *(end for _, end in runs)]
        assert [begin for begin, _ in runs] == ends[:-1], "runs overlap or leave a gap"
        assert ends[-1] == self.capacity, "runs do not reach the capacity"
