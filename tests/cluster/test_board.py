"""The board: what it keeps of replicas, for how long, and what each hears of it."""

from __future__ import annotations

from typing import Any

from quickchange_server.cluster.board import FORGETS_KEPT, SILENT_SECONDS, Board
from quickchange_server.engine_client.adapter_status import Residence
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.protocol import Forget, Pin


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(label: str, kind: Any = "engine", **fields: Any) -> ReplicaReport:
    return ReplicaReport(label, kind, "node", "ready", **fields)


def told(board: Board, label: str, demand: dict[str, float] | None = None, **fields: Any) -> Any:
    return board.report(report(label, **fields), demand or {}, "", 0)


def test_a_view_has_the_last_report_of_each_replica_engines_first() -> None:
    board = Board()
    told(board, "ingress-a", kind="ingress")
    told(board, "engine-b", running=1)
    told(board, "engine-a")
    told(board, "engine-b", running=2)
    view = board.view()
    assert [(r.replica, r.running) for r in view.replicas] == [
        ("engine-a", 0),
        ("engine-b", 2),
        ("ingress-a", 0),
    ]
    assert view.board == board.id


def test_a_silent_replica_leaves_the_view_and_comes_back_with_its_next_report() -> None:
    clock = Clock()
    board = Board(clock)
    told(board, "engine-a")
    clock.now += SILENT_SECONDS
    told(board, "engine-b")
    assert len(board.view().replicas) == 2
    clock.now += 0.1
    assert [r.replica for r in board.view().replicas] == ["engine-b"]
    told(board, "engine-a")
    assert len(board.view().replicas) == 2


def test_a_replica_that_ends_is_forgotten_at_once() -> None:
    board = Board()
    told(board, "engine-a")
    board.leave("engine-a")
    board.leave("engine-unknown")
    assert board.view().replicas == ()


def test_pins_reach_every_engine_until_they_are_taken_back_or_forgotten() -> None:
    board = Board()
    for digest in ("a", "b", "c"):
        board.command(Pin(digest, True))
    board.command(Pin("b", False))
    board.command(Pin("never", False))
    assert told(board, "engine-a").pins == ("a", "c") == board.view().pins
    board.command(Forget("a"))
    assert told(board, "engine-b").pins == ("c",)


def test_each_engine_hears_once_of_a_version_that_is_to_be_dropped() -> None:
    board = Board()
    first = board.report(report("engine-a"), {}, "", 0)
    board.command(Forget("x"))
    board.command(Forget("y"))
    second = board.report(report("engine-a"), {}, first.board, first.heard)
    assert second.forgets == ("x", "y")
    assert board.report(report("engine-a"), {}, second.board, second.heard).forgets == ()
    assert told(board, "engine-new").forgets == ("x", "y")


def test_an_engine_that_heard_of_an_earlier_board_hears_all_of_this_one() -> None:
    board = Board()
    board.command(Forget("x"))
    assert board.report(report("engine-a"), {}, "another board", 7).forgets == ("x",)


def test_only_the_latest_dropped_versions_are_kept() -> None:
    board = Board()
    for number in range(FORGETS_KEPT + 5):
        board.command(Forget(str(number)))
    forgets = told(board, "engine-a").forgets
    assert (forgets[0], len(forgets)) == ("5", FORGETS_KEPT)


def test_popularity_sums_what_all_engines_were_asked_for_with_the_sizes_on_their_devices() -> None:
    board = Board()
    residency = {
        "a": Residence("device", 10, False),
        "b": Residence("host", 99, False),
    }
    told(board, "engine-a", {"a": 1.0, "b": 2.5}, residency=residency)
    told(board, "engine-b", {"a": 2.0, "c": 0.5})
    found = [(p.digest, p.bytes) for p in board.popular(10)]
    assert found == [("a", 10), ("b", 0), ("c", 0)]
    assert [p.digest for p in board.popular(1)] == ["a"]


def test_popularity_of_a_replica_that_has_gone_goes_with_it() -> None:
    board = Board()
    told(board, "engine-a", {"a": 5.0})
    told(board, "engine-b", {"b": 1.0})
    board.leave("engine-a")
    assert [p.digest for p in board.popular(10)] == ["b"]
