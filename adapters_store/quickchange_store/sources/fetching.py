"""Fetching of an adapter's files into a folder, from which it is imported like any other.

Only what readers read is fetched: files beside the configuration, by their kinds. What they take
together is known before the first is fetched. Credentials come from where the libraries of each
place look for them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quickchange_store.errors import AdapterSourceError, NoAdapterThereError
from quickchange_store.sources.adapter_url import AdapterUrl, Scheme
from quickchange_store.sources.bucket_source import bucket_files
from quickchange_store.sources.hub_source import hub_files
from quickchange_store.sources.registry_source import registry_files
from quickchange_store.sources.remote_files import RemoteFiles

KINDS = frozenset({".json", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".yaml", ".txt"})
MOST_FILES = 256
_OTHERS = frozenset({"optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin"})
_OPENERS: Mapping[Scheme, Callable[[AdapterUrl], RemoteFiles]] = {
    "hf": hub_files,
    "s3": bucket_files,
    "gs": bucket_files,
    "oci": registry_files,
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A folder with an adapter's files, and where they are from."""

    folder: Path
    origin: Mapping[str, str]  # the URL, and the revision where the place has revisions


@contextmanager
def fetched(url: AdapterUrl, most_bytes: int | None = None) -> Iterator[Fetched]:
    """Fetch the files at a URL into a folder, which is removed at the end.

    most_bytes: of all files together. Raises AdapterSourceError where there is no adapter or it is
    too large, SourceUnavailableError where the place can't be reached, and OSError.
    """
    files = _OPENERS[url.scheme](url)
    wanted = {name: size for name, size in files.sizes.items() if _is_wanted(name)}
    if not wanted:
        raise NoAdapterThereError(
            "there are no files of an adapter there",
            file=url.text,
            remedy="see the URL: it names the folder that holds adapter_config.json",
        )
    total = sum(wanted.values())
    if len(wanted) > MOST_FILES or (most_bytes is not None and total > most_bytes):
        allowed = "" if most_bytes is None else f" and {most_bytes:,} bytes"
        raise AdapterSourceError(
            f"{len(wanted)} files of {total:,} bytes, while an adapter may have {MOST_FILES} files"
            f"{allowed}",
            file=url.text,
            remedy="see the URL, or raise the limit (max_upload_bytes)",
        )
    with tempfile.TemporaryDirectory(prefix="quickchange-fetch-") as folder:
        for name in sorted(wanted):
            files.download(name, Path(folder) / name)
        origin = {"url": url.text}
        if files.revision is not None:
            origin["revision"] = files.revision
        yield Fetched(Path(folder), origin)


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.name == name and not name.startswith(".") and "\\" not in name
    return plain and path.suffix in KINDS and name not in _OTHERS
