"""Streaming client for any server that answers `/v1/completions` in OpenAI's form.

Servers differ in how a request names its adapter: that is a dialect. Knows nothing of load patterns
or statistics.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

import httpx

from quickchange_bench.bench_results import ClientCompletion
from quickchange_bench.load.workload import Request

DialectName = Literal["openai", "llamacpp", "mistralrs"]
DIALECT_NAMES: tuple[DialectName, ...] = get_args(DialectName)
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServedNames:
    """A server's names for its base model and its adapters, and its API key."""

    model: str
    adapters: tuple[str, ...] = ()
    key: str | None = field(default=None, repr=False)
    users: bool = False  # True: each request names a user of its own


def _openai(target: ServedNames, adapter: int | None) -> Body:
    return {"model": target.model if adapter is None else target.adapters[adapter]}


def _llamacpp(target: ServedNames, adapter: int | None) -> Body:
    # adapters go by their place on the server's command line; an empty list would mean "all of
    # them at scale 1", so the base model is asked for by scaling one to 0
    chosen = {"id": 0, "scale": 0.0} if adapter is None else {"id": adapter, "scale": 1.0}
    return {"model": target.model, "lora": [chosen], "cache_prompt": False}


def _mistralrs(target: ServedNames, adapter: int | None) -> Body:
    body: Body = {"model": target.model}
    if adapter is not None:
        body["adapters"] = [target.adapters[adapter]]
    return body


DIALECTS: dict[DialectName, Callable[[ServedNames, int | None], Body]] = {
    "openai": _openai,
    "llamacpp": _llamacpp,
    "mistralrs": _mistralrs,
}


def request_body(dialect: DialectName, target: ServedNames, request: Request) -> Body:
    """Body of a greedy, streamed request of exactly `request.output_tokens`, with a usage count."""
    user = {"user": f"user-{request.index}"} if target.users else {}
    return {
        **DIALECTS[dialect](target, request.adapter),
        **user,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def bearer(key: str) -> dict[str, str]:
    """Header with an API key."""
    return {"Authorization": f"Bearer {key}"}


def check_url(url: str, *, allow_remote: bool) -> str:
    """The address without its trailing slash.

    Raises:
        ValueError: not http(s), or not this machine and `allow_remote` is off.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url {url!r}: give http://HOST:PORT")
    if not allow_remote and not _is_loopback(parts.hostname):
        raise ValueError(
            f"--url {url!r} is another machine: a load test may disturb it; "
            "add --allow-remote if it is yours to load"
        )
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServerRefusedError(Exception):
    """The server answered with an error, in the status or inside the stream."""


@dataclass(slots=True)
class _Stream:
    """State of one answer as far as it has been read."""

    started: float
    first_token: float | None = None
    last_event: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    usage: Body = field(default_factory=dict)

    def take(self, event: Body) -> None:
        if "error" in event:
            raise ServerRefusedError(json.dumps(event["error"])[:400])
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices") or []
        # the closing event has no text; a token that is half a character has none either, but
        # comes without a finish reason
        if choices and (choices[0].get("text") or choices[0].get("finish_reason") is None):
            self._token(choices[0].get("text") or "")

    def _token(self, text: str) -> None:
        now = time.perf_counter()
        if self.first_token is None:
            self.first_token = now
        else:
            self.gaps.append(now - self.last_event)
        self.last_event = now
        self.text.append(text)

    def completion(self, request: Request, error: str | None) -> ClientCompletion:
        return ClientCompletion(
            index=request.index,
            adapter=request.adapter,
            started=self.started,
            finished=time.perf_counter(),
            first_token=self.first_token,
            gaps=tuple(self.gaps),
            prompt_tokens=self.usage.get("prompt_tokens"),
            output_tokens=self.usage.get("completion_tokens", len(self.text)),
            text="".join(self.text),
            error=error,
        )


class Client:
    """An asynchronous context manager that completes requests on one server.

    `connections` bounds how many run at once; `timeout` is the longest silence, in seconds.
    """

    def __init__(
        self,
        url: str,
        target: ServedNames,
        dialect: DialectName = "openai",
        *,
        connections: int = 64,
        timeout: float = 900.0,
    ) -> None:
        self.target = target
        self.dialect: DialectName = dialect
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={} if target.key is None else bearer(target.key),
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=connections),
            trust_env=False,  # a proxy between would be measured too
        )

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.http.__aexit__(kind, error, trace)

    def body(self, request: Request) -> Body:
        """The body sent for a request."""
        return request_body(self.dialect, self.target, request)

    async def complete(self, request: Request) -> ClientCompletion:
        """Stream one completion to its end. A failure is an outcome too: `error` says which."""
        stream = _Stream(started=time.perf_counter())
        try:
            await self._read(request, stream)
        except (httpx.HTTPError, ServerRefusedError, json.JSONDecodeError) as error:
            return stream.completion(request, f"{type(error).__name__}: {error}")
        return stream.completion(request, None)

    async def _read(self, request: Request, stream: _Stream) -> None:
        body = self.body(request)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer = (await response.aread()).decode(errors="replace")
                raise ServerRefusedError(f"status {response.status_code}: {answer[:400]}")
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                stream.take(json.loads(data))
        raise ServerRefusedError("the stream ended without [DONE]")
