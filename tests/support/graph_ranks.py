"""The real engine over ranks that run steps from stand-ins for captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Literal

from quickchange_server.config import Settings
from quickchange_server.engine import model_runner
from quickchange_server.engine.parallel import follower, followers
from quickchange_server.engine.parallel.orders import Order, Pass
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.model.graphs.cuda_graphs import Outputs

_phase: Literal["running", "capturing", "replaying"] = "running"


@contextmanager
def _during(phase: Literal["capturing", "replaying"]) -> Iterator[None]:
    global _phase
    _phase = phase
    yield
    _phase = "running"


def _capture(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A capture in CUDA's manner: two runs, then the one that is captured.

    A replay runs again, and orders nothing: a real one has no Python.
    """
    for _ in range(2):
        compute()
    with _during("capturing"):
        outputs = tuple(output.clone() for output in compute())

    def replay() -> None:
        with _during("replaying"):
            for output, again in zip(outputs, compute(), strict=True):
                output.copy_(again)

    return replay, outputs


def _captured(run: Callable[[], None], _memory: object) -> Callable[[], None]:
    run()
    return run


def main(connection: Connection, settings: Settings) -> None:
    """Main function of an engine's process."""
    order = followers.Followers._order

    def unless_replaying(self: followers.Followers, given: Order) -> None:
        if not (_phase == "replaying" and isinstance(given, Pass)):
            order(self, given)

    followers.Followers._order = unless_replaying  # type: ignore[method-assign]
    followers._capturing = lambda: _phase == "capturing"
    follower._captured = _captured
    model_runner.capture_for = lambda _device: _capture
    engine_main(connection, settings)
