"""Triton's cache of compiled kernels: filled ahead, shipped, and found again.

Triton keeps what it compiles by a key of source, types, constants, options, target and its own
version, so that entries that were made elsewhere, by an `absent_gpu`, are found on the GPU.
QUICKCHANGE_PREBUILT names a folder that was filled before, such as an image's (see native.py); its
part `triton` is linked into the cache at the start, and never written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREBUILT = "triton"  # folder within QUICKCHANGE_PREBUILT


@dataclass
class CacheFilling:
    """Kernels by name, as they were compiled, and the number of those that the cache had."""

    folder: Path
    compiled: list[str] = field(default_factory=list)
    found: int = 0


@contextmanager
def filling(folder: Path | None) -> Iterator[CacheFilling]:
    """Let Triton keep compiled kernels in `folder` (None: where it does so anyway), without the
    stages between source and binary."""
    from triton import knobs

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            filled.found += 1
        else:
            filled.compiled.append(src.fn.__name__)

    with knobs.cache.scope(), knobs.compilation.scope():
        if folder is not None:
            knobs.cache.dir = str(folder)
        knobs.compilation.store_binary_only = True
        knobs.compilation.listener = note
        filled = CacheFilling(Path(knobs.cache.dir))
        yield filled


def link_prebuilt() -> int:
    """Link the entries of QUICKCHANGE_PREBUILT that the cache lacks; returns how many.

    Raises OSError where the cache's folder can't be written, which compiling would meet as well.
    """
    prebuilt = os.environ.get("QUICKCHANGE_PREBUILT")
    if not prebuilt or not (source := Path(prebuilt) / PREBUILT).is_dir():
        return 0
    from triton import knobs

    cache = Path(knobs.cache.dir)
    cache.mkdir(parents=True, exist_ok=True)
    linked = 0
    for entry in source.iterdir():
        place = cache / entry.name
        if entry.is_dir() and not place.exists():
            place.symlink_to(entry.resolve(), target_is_directory=True)
            linked += 1
    return linked
