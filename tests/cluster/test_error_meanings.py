"""Errors cross between replicas as what they are, and losses of replicas are known as such."""

from __future__ import annotations

import asyncio
import inspect
import pickle

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

import grpc
from ray import cloudpickle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import ReplicaUnavailableError, RequestCancelledError

from quickchange_server import errors
from quickchange_server.cluster.serve_replica import meaning_of
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.errors import EngineFailedError, QueueFullError, QuickchangeError

ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, QuickchangeError)
]


def raised_in_a_task(error: Exception) -> Exception:
    """What a caller of Ray's gets of an error that a task raised, after both pickled it."""
    task_error = RayTaskError("generate", "traceback", error)
    crossed = cloudpickle.loads(cloudpickle.dumps(task_error))
    made: Exception = crossed.as_instanceof_cause()
    return made


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_for_clients_keeps_its_kind_and_fields_on_its_way(
    kind: type[QuickchangeError],
) -> None:
    error = kind("what is wrong; what to do", param="name", retry_after=2.5)
    for crossed in (pickle.loads(pickle.dumps(error)), meaning_of(raised_in_a_task(error))):
        assert type(crossed) is kind
        assert str(crossed) == crossed.message == "what is wrong; what to do"
        assert (crossed.param, crossed.retry_after, crossed.status) == ("name", 2.5, kind.status)


@pytest.mark.parametrize("given_back", [False, True])
def test_a_lost_replica_is_told_with_whether_it_gave_back(given_back: bool) -> None:
    crossed = meaning_of(raised_in_a_task(ReplicaLostError("gone", given_back=given_back)))
    assert isinstance(crossed, ReplicaLostError)
    assert (str(crossed), crossed.given_back) == ("gone", given_back)


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ActorUnavailableError("the actor is unavailable", b"0" * 16),
        WorkerCrashedError(),
        NodeDiedError("the node died"),
        ObjectLostError("0" * 56, None, "stack"),
        OutOfMemoryError("the worker was killed"),
        TaskCancelledError(),
        RequestCancelledError("id"),
        ReplicaUnavailableError("replica"),
        grpc.RpcError("reset"),
        ConnectionResetError(),
        RayError("any other"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_loss_of_an_actor_a_worker_a_node_or_a_connection_is_a_lost_replica(
    error: Exception,
) -> None:
    meaning = meaning_of(error)
    assert isinstance(meaning, ReplicaLostError)
    assert not meaning.given_back
    assert str(meaning)


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyError("x"), asyncio.QueueFull()])
def test_a_fault_of_the_replicas_own_is_no_lost_replica(error: Exception) -> None:
    for seen in (error, raised_in_a_task(error)):
        assert isinstance(meaning_of(seen), EngineFailedError)


def test_the_first_of_errors_within_errors_counts() -> None:
    inner = raised_in_a_task(QueueFullError("full", retry_after=1.0))
    meaning = meaning_of(raised_in_a_task(inner))
    assert isinstance(meaning, QueueFullError)
    assert meaning.retry_after == 1.0
