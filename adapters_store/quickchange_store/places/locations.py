"""The place that people mean by what they write: a folder, or a URL of one or of a bucket."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from quickchange_store.errors import StoreLocationError
from quickchange_store.places.bucket_place import BucketPlace
from quickchange_store.places.folder_place import FolderPlace
from quickchange_store.places.objects import EXCLUSIVE, Objects
from quickchange_store.places.place import Place
from quickchange_store.places.version_cache import VersionCache

CACHE_BYTES = 20 << 30
CACHE_VARIABLE, CACHE_BYTES_VARIABLE = "QUICKCHANGE_STORE_CACHE", "QUICKCHANGE_STORE_CACHE_BYTES"

_Location = str | os.PathLike[str]


def place_of(location: _Location, cache: _Location | None, cache_bytes: int | None) -> Place:
    """The place at a folder or URL. Raises StoreLocationError."""
    text = os.fspath(location)
    if "://" not in text:
        return FolderPlace(Path(text))
    url = _checked(text)
    if url.startswith("file://"):
        return FolderPlace(Path(unquote(urlsplit(url).path)))
    folder = os.environ.get(CACHE_VARIABLE) if cache is None else cache
    limit = _bytes_by_environment() if cache_bytes is None else cache_bytes
    where = _default_cache() if folder is None else Path(folder)
    return BucketPlace(Objects.at(url), VersionCache(where, limit))


def _checked(text: str) -> str:
    """The URL without a slash at its end. An error never repeats a URL that may hold a secret."""
    scheme, _, rest = text.partition("://")
    place, _, path = rest.partition("/")
    if "@" in place:
        raise StoreLocationError(
            f"a {scheme}:// URL holds a user's name or a password",
            key="store",
            remedy="leave them out: credentials come from where the service's library looks for "
            "them, such as AWS_ACCESS_KEY_ID or a role",
        )
    if "?" in rest or "#" in rest or ".." in path.split("/"):
        raise StoreLocationError(
            f"a {scheme}:// URL has a part that no store's URL has: ?, # or ..",
            key="store",
            remedy="write it as SCHEME://BUCKET/PREFIX",
        )
    if scheme == "file":
        if place not in ("", "localhost") or not path:
            raise StoreLocationError(
                "a file:// URL names a folder of this machine by three slashes",
                key="store",
                remedy="write it as file:///FOLDER",
            )
        return text
    if scheme not in EXCLUSIVE:
        raise StoreLocationError(
            f"{scheme}:// can't hold a store: no object can be created there only where there is "
            "none, and several writers would undo each other's changes",
            key="store",
            remedy=f"use a folder or one of {', '.join(f'{known}://' for known in EXCLUSIVE)}",
        )
    if not place:
        raise StoreLocationError(
            f"a {scheme}:// URL names no bucket", key="store", remedy=f"write {scheme}://BUCKET/…"
        )
    return text.rstrip("/")


def _default_cache() -> Path:
    """Beside the demo's model: `$XDG_CACHE_HOME/quickchange/store`, else under `~/.cache`."""
    own, xdg = os.environ.get("QUICKCHANGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / "store"
    return (Path(xdg) if xdg else Path.home() / ".cache") / "quickchange" / "store"


def _bytes_by_environment() -> int:
    text = os.environ.get(CACHE_BYTES_VARIABLE)
    if text is None:
        return CACHE_BYTES
    if not text.isdecimal():
        raise StoreLocationError(
            f"{text!r} is no number of bytes", key=CACHE_BYTES_VARIABLE, remedy="write 20000000000"
        )
    return int(text)
