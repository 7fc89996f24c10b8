"""Requests that a server has recorded of an adapter, as prompts with the outputs that it gave.

They are asked of the server, which gives a tenant's alone, to a key of it with the scope admin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from quickchange_training.errors import DataError

if TYPE_CHECKING:
    from quickchange_training.turbo.turbo_data import Prompt

_SECONDS = 60.0  # until a server that does not answer is given up
_SHOWN = 500  # characters of an answer in a message


@dataclass(frozen=True)
class RecordingServer:
    """A server's address, and the API key for it."""

    url: str
    key: str | None = field(repr=False)


@dataclass(frozen=True)
class RecordedRequests:
    """What a tenant asked an adapter's version, and what it said; of equal prompts the last."""

    tenant: str
    prompts: tuple[Prompt, ...]
    said: Mapping[tuple[int, ...], tuple[int, ...]]


def recorded_requests(
    server: RecordingServer, adapter: str, digest: str, longest: int
) -> RecordedRequests:
    """The recorded requests that the version `digest` of an adapter answered.

    Those of more than `longest` tokens, prompt and output, are left out. Raises DataError where the
    server gives none.
    """
    from quickchange_training.turbo.turbo_data import Prompt

    answer = _asked(server, f"/v1/recordings/{quote(adapter)}")
    said: dict[tuple[int, ...], tuple[int, ...]] = {}
    others = 0
    for one in answer["data"]:
        prompt, output = tuple(one["prompt"]), tuple(one["output"])
        if one["digest"] != digest:
            others += 1
        elif len(prompt) + len(output) <= longest:
            said.pop(prompt, None)
            said[prompt] = output
    if not said:
        raise DataError(
            f"--recorded: {server.url} has recorded no request that this version of {adapter} "
            f"answered and that --max-length {longest} has room for ({others} of other versions); "
            f"begin with PUT /v1/recordings/{adapter}, and send requests"
        )
    prompts = tuple(
        Prompt(prompt, (), f"recorded request {number}")
        for number, prompt in enumerate(said, start=1)
    )
    return RecordedRequests(answer["tenant"], prompts, said)


def _asked(server: RecordingServer, path: str) -> Any:
    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    url = server.url.rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise DataError(
            f"--server {server.url}: give an address that begins with http:// or https://"
        )
    try:
        with urlopen(Request(url, headers=headers), timeout=_SECONDS) as response:
            return json.load(response)
    except HTTPError as error:
        said = error.read().decode(errors="replace")[:_SHOWN]
        raise DataError(f"--recorded: {url} answers {error.code}: {said}") from error
    except (URLError, OSError, ValueError) as error:
        raise DataError(f"--recorded: {url} can't be read ({error}); give --server") from error
