"""URLs of adapters: what they may say, and which of them an operator allows.

hf://OWNER/NAME[@REVISION][/FOLDER]        a repository of the Hugging Face hub
s3://BUCKET/PREFIX, gs://BUCKET/PREFIX     files of a bucket
oci://REGISTRY/REPOSITORY[:TAG|@sha256:…]  an artifact with a layer for each file
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import unquote

from quickchange_store.errors import AdapterSourceError

Scheme = Literal["hf", "s3", "gs", "oci"]
FORMS: dict[Scheme, str] = {
    "hf": "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME@REVISION/FOLDER",
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "oci": "oci://REGISTRY/REPOSITORY:TAG or oci://REGISTRY/REPOSITORY@sha256:DIGEST",
}
_REST: dict[Scheme, re.Pattern[str]] = {
    "hf": re.compile(r"(?P<place>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.%-]+))?(/(?P<path>[\w./-]+))?"),
    "s3": re.compile(r"(?P<place>[a-z0-9][\w.-]*)/(?P<path>[^\\@:?#\x00-\x20]+)"),
    "gs": re.compile(r"(?P<place>[a-z0-9][\w.-]*)/(?P<path>[^\\@:?#\x00-\x20]+)"),
    "oci": re.compile(
        r"(?P<place>[\w.-]+(:\d{1,5})?)/(?P<path>[a-z0-9][a-z0-9._/-]*)"
        r"(:(?P<tag>\w[\w.-]{0,127})|@(?P<revision>sha256:[0-9a-f]{64}))?"
    ),
}
_MOST = 2048  # characters


@dataclass(frozen=True, slots=True)
class AdapterUrl:
    """A URL of an adapter, taken apart."""

    text: str
    scheme: Scheme
    place: str  # a repository of the hub, a bucket, a registry
    path: str  # below the place; empty: all of it
    revision: str | None  # as the URL asks for it

    def within(self, prefixes: Iterable[str]) -> bool:
        """True if one of the prefixes ends where a part of this URL does: `hf://acme` has
        `hf://acme/x` and not `hf://acme-2/x`."""
        return any(_begins(self.text, prefix.strip()) for prefix in prefixes)


def is_url(text: str) -> bool:
    """True for what is written as a URL, whatever its scheme."""
    return "://" in text


def adapter_url(text: str) -> AdapterUrl:
    """Take a URL apart. Raises AdapterSourceError, whose message repeats no secret."""
    scheme, _, rest = text.partition("://")
    found = next((known for known in get_args(Scheme) if known == scheme), None)
    if found is None:
        shown = scheme if re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this"
        raise AdapterSourceError(
            f"{shown}:// is no place that adapters are fetched from",
            remedy=f"use a folder, or one of {', '.join(f'{known}://' for known in FORMS)}",
        )
    match = _REST[found].fullmatch(rest) if len(text) <= _MOST else None
    parts = {} if match is None else match.groupdict()
    path = (parts.get("path") or "").rstrip("/")
    if match is None or any(part in ("", ".", "..") for part in path.split("/") if path):
        raise AdapterSourceError(
            f"this {scheme}:// URL can't be read; user names, passwords and queries have no place "
            "in it",
            remedy=f"write {FORMS[found]}",
        )
    revision = parts.get("tag") or parts.get("revision")
    return AdapterUrl(
        text.rstrip("/"),
        found,
        parts["place"],
        path,
        None if revision is None else unquote(revision),
    )


def _begins(text: str, prefix: str) -> bool:
    if not is_url(prefix) or not text.startswith(prefix):
        return False
    return prefix.endswith("/") or text[len(prefix) :][:1] in ("", "/", "@", ":")
