"""Memory that a process holds and does not use, given back to the system once it has started.

Two kinds: the heap's free pages, which glibc keeps, and pages of mapped files that were read once,
mostly code that runs while modules are imported (120 MiB of torch's). Linux with glibc alone;
elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_RANGE = re.compile(r"(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<may>\S+) \S+ \S+ \d+\s+/")
_FIGURE = re.compile(r"(?P<name>\w+):\s+(?P<kib>\d+) kB")
_DONTNEED = 4  # MADV_DONTNEED


def release_unused_memory() -> None:
    """Return free heap and unchanged pages of files; what is used again is mapped again.

    A page of a file comes back from the page cache in less than a microsecond. Call it when a start
    is done, not beside requests: it takes some milliseconds.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with Path("/proc/self/smaps").open() as lines:
        for begin, end in unchanged(lines):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def unchanged(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Ranges of addresses with pages of files that can't be written and never were.

    A library's relocated data can't be written either, but was: what it holds is in no file.
    """
    found: tuple[int, int] | None = None
    resident = own = 0
    for line in smaps:
        figure = _FIGURE.match(line)
        if figure is None:
            if found is not None and resident and not own:
                yield found
            place = _RANGE.match(line)
            fixed = place is not None and "w" not in place["may"]
            found = (int(place["begin"], 16), int(place["end"], 16)) if place and fixed else None
            resident = own = 0
        elif figure["name"] == "Rss":
            resident = int(figure["kib"])
        elif figure["name"] in ("Anonymous", "Private_Dirty", "Locked", "Swap"):
            own += int(figure["kib"])
    if found is not None and resident and not own:
        yield found
