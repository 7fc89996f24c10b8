"""Places that clients may name for an adapter: folders of this machine, and URLs, by settings."""

from __future__ import annotations

from pathlib import Path

from quickchange_server.config import Settings
from quickchange_server.errors import ForbiddenError
from quickchange_store.sources.adapter_url import AdapterUrl, adapter_url, is_url


def allowed_place(settings: Settings, text: str, param: str) -> Path | AdapterUrl:
    """The place that a client's field names. Raises ForbiddenError where the settings don't allow
    it, and AdapterSourceError for a URL that can't be read."""
    if is_url(text):
        url = adapter_url(text)
        if not url.within(settings.source_prefixes):
            raise ForbiddenError(
                f"{param}: the setting adapter_sources (QUICKCHANGE_ADAPTER_SOURCES) does not "
                "allow this URL; have whoever runs the server add its beginning there, or upload "
                "the files",
                param=param,
            )
        return url
    allowed = settings.adapter_paths
    if allowed is None:
        allowed = not settings.reachable
    if not allowed:
        raise ForbiddenError(
            f"{param}: adding an adapter from a path of the server's machine is switched off by "
            "the setting adapter_paths (QUICKCHANGE_ADAPTER_PATHS); upload the files instead",
            param=param,
        )
    return Path(text)
