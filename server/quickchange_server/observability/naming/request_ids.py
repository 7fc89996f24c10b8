"""The id of the HTTP request that is worked on, for whatever is said of it; and log lines with it.

A context variable holds it: tasks that a request starts inherit it, and no function has to pass it
on. Headers of the answer that are known only deep inside are left here too.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass, field

FORMAT = "%(levelname)s %(name)s: %(message)s%(request)s"


@dataclass(frozen=True, slots=True)
class Arrived:
    """An HTTP request that is being answered."""

    request_id: str
    headers: dict[str, str] = field(default_factory=dict)  # of the answer


_ARRIVED: ContextVar[Arrived | None] = ContextVar("arrived", default=None)


def arrive(request_id: str) -> Arrived:
    """Begin to answer a request, in the task that does it and in those it starts."""
    arrived = Arrived(request_id)
    _ARRIVED.set(arrived)
    return arrived


def current() -> str:
    """The id of the request that this task works on; empty outside of any."""
    arrived = _ARRIVED.get()
    return "" if arrived is None else arrived.request_id


def answer_with(name: str, value: str) -> None:
    """Have the answer carry a header, if it has not begun."""
    arrived = _ARRIVED.get()
    if arrived is not None:
        arrived.headers[name] = value


class _Requests(logging.Filter):
    """Gives every record the field that FORMAT has for the request."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request = f" (request {current()})" if current() else ""
        return True


def log_lines() -> None:
    """Write this process's log lines to stderr, those about a request with its id."""
    handler = logging.StreamHandler()
    handler.addFilter(_Requests())
    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=[handler])
