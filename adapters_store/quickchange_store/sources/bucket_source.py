"""Adapters in buckets, through fsspec."""

from __future__ import annotations

from pathlib import Path

from quickchange_store.errors import AdapterSourceError, StoreLocationError, StoreUnavailableError
from quickchange_store.places.objects import Objects
from quickchange_store.sources.adapter_url import AdapterUrl
from quickchange_store.sources.remote_files import RemoteFiles, nothing_there, unreachable


def bucket_files(url: AdapterUrl) -> RemoteFiles:
    """The files right below a prefix. A bucket has no revisions that name several files.

    Raises AdapterSourceError and SourceUnavailableError.
    """
    parent, _, last = url.path.rpartition("/")
    root = f"{url.scheme}://{url.place}" + (f"/{parent}" if parent else "")
    try:
        objects = Objects.at(root)
        found = objects.under(last)
    except StoreLocationError as error:
        raise AdapterSourceError(error.problem, file=url.text, remedy=error.remedy) from error
    except StoreUnavailableError as error:
        raise unreachable(url.text, error) from error
    start = len(last) + 1
    sizes = {key[start:]: entry.size for key, entry in found.items() if key[:start] == f"{last}/"}
    if not sizes:
        raise nothing_there(url.text, "no object begins so")

    def download(name: str, path: Path) -> None:
        try:
            objects.download(f"{last}/{name}", path, sizes[name])
        except StoreUnavailableError as error:
            raise unreachable(url.text, error) from error

    return RemoteFiles(sizes, None, download)
