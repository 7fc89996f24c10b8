"""Models by their id on the Hugging Face hub, where the hub may be out of reach.

Its library retries each of several requests for a minute before it says so; whoever is offline is
then served from the hub's cache, or told at once.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

OFFLINE = "HF_HUB_OFFLINE"
SECONDS = 3.0  # for one connection
_PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def look_for_hub(model: str) -> None:
    """Switch the hub's library offline where `model` is an id and the hub can't be reached.

    To be called before that library is imported; it and child processes read the environment.
    """
    if OFFLINE in os.environ or not _is_id(model) or _has_proxy():
        return
    end = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = end.port or (80 if end.scheme == "http" else 443)
    try:
        socket.create_connection((end.hostname or "", port), SECONDS).close()
    except OSError:
        os.environ[OFFLINE] = "1"


def _is_id(model: str) -> bool:
    """True for NAME or OWNER/NAME, unless it is a folder."""
    written_as_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    return bool(model) and not written_as_path and not Path(model).exists()


def _has_proxy() -> bool:
    return any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES)
