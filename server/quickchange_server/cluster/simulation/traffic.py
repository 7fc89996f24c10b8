"""Traffic for plans: traces read from files, or drawn.

A trace is a CSV file with a header line, or one JSON object a line; a name that ends in .csv is the
former. Fields: `time` (seconds, ascending or not), `adapter` (a name; empty or null: the plain
base), `prompt` and `output` (tokens, at least 1), and if wanted `prefix` (an id that requests with
the same beginning share) with `prefix_tokens` (its length, at most the prompt's).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quickchange_server.errors import SettingError

DRAWN = "zipf:"
_NEEDED = ("time", "adapter", "prompt", "output")
_MOST_TOKENS = 1 << 24


class TracedRequest(NamedTuple):
    """One request of a trace."""

    time: float  # seconds
    adapter: str  # "": the plain base
    prompt: int  # tokens
    output: int
    prefix: str = ""  # id of a beginning that it shares; "": none
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ZipfTraffic:
    """Requests at random times (Poisson) for adapters by Zipf's law: the k-th most popular one
    gets a share in proportion to k^-alpha. Lengths are geometric with the given means."""

    adapters: int = 1000
    alpha: float = 1.0
    rate: float = 10.0  # requests/s
    seconds: float = 60.0
    prompt: int = 256  # mean
    output: int = 64
    prefixes: int = 0  # conversations or system prompts of each adapter; 0: prompts share nothing
    prefix_tokens: int = 128  # length of each; prompts come after it
    seed: int = 0

    def requests(self) -> list[TracedRequest]:
        """The requests, in order of time; the same for the same fields."""
        draw = np.random.default_rng(self.seed)
        count = int(draw.poisson(self.rate * self.seconds))
        times = np.sort(draw.uniform(0, self.seconds, count))
        weights = np.arange(1, self.adapters + 1, dtype=float) ** -self.alpha
        adapters = draw.choice(self.adapters, size=count, p=weights / weights.sum())
        prompts = draw.geometric(1 / self.prompt, count)
        outputs = draw.geometric(1 / self.output, count)
        prefixes = draw.integers(0, max(self.prefixes, 1), count)
        shared = self.prefix_tokens if self.prefixes else 0
        return [
            TracedRequest(
                float(time),
                f"adapter-{adapter}",
                int(prompt) + shared,
                int(output),
                f"{adapter}/{prefix}" if shared else "",
                shared,
            )
            for time, adapter, prompt, output, prefix in zip(
                times, adapters, prompts, outputs, prefixes, strict=True
            )
        ]


def traffic(given: str) -> list[TracedRequest]:
    """The requests of `--traffic`: a file's, or drawn as `zipf:adapters=1000,rate=10,…` says.

    Raises SettingError, which names the line and the field.
    """
    requests = _drawn(given) if given.startswith(DRAWN) else _read(Path(given))
    if not requests:
        raise _wrong(given, "has no request; give a longer one")
    return sorted(requests, key=lambda request: request.time)


def _drawn(given: str) -> list[TracedRequest]:
    known = {field.name: type(field.default) for field in fields(ZipfTraffic)}
    values: dict[str, Any] = {}
    for part in filter(None, given.removeprefix(DRAWN).split(",")):
        name, _, text = part.partition("=")
        kind = known.get(name)
        if kind is None:
            raise _wrong(given, f"{name!r} is none of {', '.join(known)}")
        least = 0 if name in ("prefixes", "seed", "alpha") else 1 if kind is int else 1e-9
        values[name] = _number(
            text, kind, least, lambda what, n=name: _wrong(given, f"{n}: {what}")
        )
    return ZipfTraffic(**values).requests()


def _read(path: Path) -> list[TracedRequest]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"is not UTF-8 ({error.reason}); save it as UTF-8") from error
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    return [_request(f"{path}, line {number}", row) for number, row in rows]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise _wrong(f"{path}, line 1", f"the header lacks {', '.join(missing)}")
    for row in reader:
        if None in row or None in row.values():
            raise _wrong(
                f"{path}, line {reader.line_num}", "has more or fewer fields than the header"
            )
        yield reader.line_num, {name: value for name, value in row.items() if value != ""}


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _wrong(f"{path}, line {number}", f"is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _wrong(f"{path}, line {number}", "is not a JSON object")
        yield number, row


def _request(where: str, row: Mapping[str, Any]) -> TracedRequest:
    def number(name: str, kind: type, least: float) -> Any:
        if name not in row:
            raise _wrong(where, f"{name}: is missing")
        return _number(row[name], kind, least, lambda what: _wrong(where, f"{name}: {what}"))

    def text(name: str) -> str:
        value = row.get(name)
        if not isinstance(value, str | int | None) or isinstance(value, bool):
            raise _wrong(where, f"{name}: {value!r} is not a name; give one, or nothing")
        return "" if value is None else str(value)

    prompt = number("prompt", int, 1)
    prefix = text("prefix")
    shared = number("prefix_tokens", int, 1) if prefix else 0
    if shared > prompt:
        raise _wrong(where, f"prefix_tokens: {shared} exceeds prompt, {prompt}; lower it")
    time, output = number("time", float, -math.inf), number("output", int, 1)
    return TracedRequest(time, text("adapter"), prompt, output, prefix, shared)


def _number(value: Any, kind: type, least: float, wrong: Any) -> Any:
    """A value as a number of this kind. Raises what `wrong` makes of the fault."""
    what = "a whole number" if kind is int else "a number"
    bound = "" if least == -math.inf else f" of at least {least:g}"
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value")
        number = kind(value)
        if not math.isfinite(number) or number < least or number != float(value):
            raise ValueError("out of range")
        if kind is int and number > _MOST_TOKENS:
            raise ValueError("out of range")
    except (TypeError, ValueError, OverflowError):
        raise wrong(f"{value!r} is not {what}{bound}; correct it") from None
    return number


def _wrong(where: object, what: str) -> SettingError:
    return SettingError(f"--traffic {where}: {what}", param="traffic")
