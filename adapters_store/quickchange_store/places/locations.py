"""Where a store is, from what people write: a folder, or a URL of one or of a bucket."""

from __future__ import annotations

import os
from pathlib import Path

from quickchange_store.places.folder_place import FolderPlace
from quickchange_store.places.place import Place


def place_of(
    location: str | os.PathLike[str], cache: str | os.PathLike[str] | None, cache_bytes: int | None
) -> Place:
    return FolderPlace(Path(location))
