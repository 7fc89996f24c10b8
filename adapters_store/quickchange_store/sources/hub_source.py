"""Adapters of the Hugging Face hub, through its own library and its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from quickchange_store.sources.adapter_url import AdapterUrl
from quickchange_store.sources.remote_files import RemoteFiles, nothing_there, unreachable

SECONDS = 20.0  # for the list of files


def hub_files(url: AdapterUrl) -> RemoteFiles:
    """The files of one commit: the one that the revision, or the default branch, is at now.

    Raises AdapterSourceError and SourceUnavailableError.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    def refused(error: Exception) -> Exception:
        missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        if isinstance(error, (*missing, errors.EntryNotFoundError, errors.HFValidationError)):
            # A gated repository is one of these too; the library's own words say which it is.
            return nothing_there(url.text, str(error).strip().splitlines()[0])
        return unreachable(url.text, error)

    try:
        info = hub.HfApi().model_info(
            url.place, revision=url.revision, files_metadata=True, timeout=SECONDS
        )
    except Exception as error:
        raise refused(error) from error
    folder = f"{url.path}/" if url.path else ""
    sizes = {
        each.rfilename[len(folder) :]: each.size or 0
        for each in info.siblings or ()
        if each.rfilename.startswith(folder)
    }
    commit = info.sha

    def download(name: str, path: Path) -> None:
        try:
            kept = hub.hf_hub_download(url.place, folder + name, revision=commit)
        except Exception as error:
            raise refused(error) from error
        shutil.copyfile(kept, path)

    return RemoteFiles(sizes, commit, download)
