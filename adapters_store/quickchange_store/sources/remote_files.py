"""What every place gives of an adapter: its files by name, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quickchange_store.errors import NoAdapterThereError, SourceUnavailableError


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The files of one revision."""

    sizes: Mapping[str, int]  # bytes, by names without folders
    revision: str | None  # what names exactly these files: a commit, a digest; None: nothing does
    download: Callable[[str, Path], None]  # name, local file


def nothing_there(url: str, why: str) -> NoAdapterThereError:
    return NoAdapterThereError(
        f"nothing can be fetched from there: {why}",
        file=url,
        remedy="see the URL, and whether its place lets this server's credentials read it",
    )


def unreachable(url: str, error: Exception) -> SourceUnavailableError:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return SourceUnavailableError(
        f"the place can't be read now: {said}",
        file=url,
        remedy="see the service and the credentials, and try again",
    )
