"""Bytes of a checkpoint's tensors, from its files' headers alone.

Knows nothing of what the tensors are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from quickchange_store.errors import BaseModelError

_MOST_HEADER = 100 << 20  # bytes, as safetensors itself allows


def checkpoint_bytes(folder: str | Path) -> int | None:
    """Bytes of all tensors in a folder's safetensors files; None where it has none.

    Raises BaseModelError for a file that is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    return sum(sum(_sizes(file)) for file in files) if files else None


def _sizes(file: Path) -> Iterator[int]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(opened.read(length))
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield end - begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BaseModelError(
            f"the base model's file can't be read ({error})",
            file=file.name,
            remedy="fetch the base model again",
        ) from error
