"""A part of a list, read in place: a long prompt is not copied for each of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import overload


class Window(Sequence[int]):
    """values[begin:end] as it was when it was made, as long as `values` only grows at its end."""

    __slots__ = ("_begin", "_end", "_values")

    def __init__(self, values: list[int], begin: int, end: int) -> None:
        self._values, self._begin, self._end = values, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._values[self._begin : self._end][index]

    def __iter__(self) -> Iterator[int]:
        return islice(self._values, self._begin, self._end)
