"""Bounds of index tables for the plain versions; csrc/binding.h has the native ones' checks.

Torch raises for an index past the end, but takes a negative one from the end and cuts a slice that
is too long: a wrong table would give a wrong answer. Tables that lie on a device are not read: the
host would have to wait for it.
"""

from __future__ import annotations

from torch import Tensor


def check_indices(table: str, values: Tensor, size: int) -> None:
    """Raise IndexError, with the table's name, unless all values are from 0 to size - 1."""
    if values.device.type != "cpu":
        return
    wrong = ((values < 0) | (values >= size)).flatten().nonzero()
    if wrong.numel():
        place = int(wrong[0])
        value = int(values.flatten()[place])
        raise IndexError(f"{table}[{place}] is {value}, outside 0 to {size - 1}")


def check_ranges(table: str, ranges: Tensor, size: int) -> None:
    """Raise IndexError unless each [n, 2] range (begin, end) lies in 0 to size."""
    if ranges.device.type != "cpu":
        return
    begin, end = ranges.unbind(1)
    wrong = ((begin < 0) | (begin > end) | (end > size)).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        first, last = ranges[place].tolist()
        raise IndexError(f"{table}[{place}] is {first} to {last}, outside 0 to {size}")


def live_ranges(table: Tensor) -> Tensor:
    """The rows of a table that begins with (begin, end) columns and are no padding."""
    return table[table[:, 0] != table[:, 1]]
