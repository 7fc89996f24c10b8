"""Experiments and their audit trail in the database, within the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from quickchange_server.errors import ConflictError, UnknownModelError
from quickchange_server.experiments.documents import decode, encode
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.frontend.caller import Caller
from quickchange_server.storage import tables
from quickchange_server.storage.revisions import bump
from quickchange_server.storage.tables_experiments import (
    EXPERIMENT_AUDIT,
    EXPERIMENT_EXPOSURES,
    EXPERIMENT_OUTCOMES,
    EXPERIMENTS,
)
from quickchange_store.names import did_you_mean

TOPIC = "experiments"  # topic of the revisions

Action = Literal["create", "update", "pause", "resume", "stop", "delete", "promote", "rollback"]


@dataclass(frozen=True, slots=True)
class Act:
    """An entry of the audit trail: the caller, the action, and its time in Unix seconds."""

    caller: Caller
    action: Action
    at: float


def documents(connection: Connection) -> dict[str, str]:
    """The documents of all experiments, by name."""
    rows = connection.execute(select(EXPERIMENTS.c.name, EXPERIMENTS.c.document))
    return {row.name: row.document for row in rows}


def create(connection: Connection, experiment: Experiment, act: Act) -> Experiment:
    """Insert an experiment. Raises ConflictError if the name is taken."""
    document = encode(experiment)
    statement = tables.insert(connection, EXPERIMENTS).values(
        id=experiment.id,
        name=experiment.name,
        version=experiment.version,
        document=document,
    )
    # A single statement, since another replica may take the name concurrently.
    made = statement.on_conflict_do_nothing().returning(EXPERIMENTS.c.id)
    if connection.execute(made).first() is None:
        raise ConflictError(
            f"name: there is an experiment {experiment.name!r} already; choose another name, or "
            "PATCH that one",
            param="name",
        )
    _note(connection, experiment, act, None, document)
    return experiment


def change(
    connection: Connection,
    name: str,
    act: Act,
    make: Callable[[Experiment], Experiment],
    version: int | None = None,
) -> Experiment:
    """Replace an experiment by `make(experiment)`, with its row locked.

    Raises UnknownModelError, ConflictError if it is not at `version` any more, and what `make`
    raises.
    """
    before = _locked(connection, name)
    old = decode(before)
    if version is not None and version != old.version:
        raise ConflictError(
            f"version: the experiment {name!r} is at version {old.version} by now, not {version}; "
            "read it again",
            param="version",
        )
    new = make(old)
    after = encode(new)
    connection.execute(
        update(EXPERIMENTS)
        .where(EXPERIMENTS.c.id == new.id)
        .values(version=new.version, document=after)
    )
    _note(connection, new, act, before, after)
    return new


def remove(connection: Connection, name: str, act: Act) -> Experiment:
    """Delete an experiment with its exposures and outcomes, but not its audit trail.

    Raises UnknownModelError.
    """
    before = _locked(connection, name)
    gone = decode(before)
    for table in (EXPERIMENT_OUTCOMES, EXPERIMENT_EXPOSURES):
        connection.execute(delete(table).where(table.c.experiment == gone.id))
    connection.execute(delete(EXPERIMENTS).where(EXPERIMENTS.c.id == gone.id))
    _note(connection, gone, act, before, None)
    return gone


def audit(connection: Connection, name: str, limit: int) -> list[dict[str, Any]]:
    """The latest entries for a name, newest first, also those of deleted experiments."""
    table = EXPERIMENT_AUDIT
    rows = connection.execute(
        select(table).where(table.c.name == name).order_by(table.c.id.desc()).limit(limit)
    )
    return [_entry(row._mapping) for row in rows]


def _entry(row: RowMapping) -> dict[str, Any]:
    sides = {side: row[side] and json.loads(row[side]) for side in ("before", "after")}
    return {**row, **sides}


def unknown(name: str, known: Iterable[str] = ()) -> UnknownModelError:
    """The error for a name. `known`: those that the caller sees, for one spelled much like it."""
    remedy = f"{did_you_mean(name, known)} GET /v1/experiments lists what there is".lstrip()
    return UnknownModelError(f"name: there is no experiment {name!r}; {remedy}", param="name")


def _locked(connection: Connection, name: str) -> str:
    """The experiment's document, with its row locked. Raises UnknownModelError."""
    query = select(EXPERIMENTS.c.document).where(EXPERIMENTS.c.name == name).with_for_update()
    document: str | None = connection.execute(query).scalar()
    if document is None:
        raise unknown(name)
    return document


def _note(
    connection: Connection, experiment: Experiment, act: Act, before: str | None, after: str | None
) -> None:
    connection.execute(
        insert(EXPERIMENT_AUDIT).values(
            experiment=experiment.id,
            name=experiment.name,
            at=act.at,
            tenant=act.caller.tenant,
            key=act.caller.key,
            action=act.action,
            before=before,
            after=after,
        )
    )
    bump(connection, TOPIC)
