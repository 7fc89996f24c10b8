"""Recording of exposures: each assigned request and the server's measurements of it."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from functools import partial

from sqlalchemy import Connection, literal, select

from quickchange_server.frontend.request_observers import Assignment, Completed, Opened
from quickchange_server.observability.experiment_metrics import ExperimentMetrics
from quickchange_server.storage.database import Database
from quickchange_server.storage.tables import insert
from quickchange_server.storage.tables_experiments import EXPERIMENT_EXPOSURES, EXPERIMENTS


class Exposures:
    """Request observer that records every assigned request when it has ended."""

    def __init__(self, database: Database, metrics: ExperimentMetrics) -> None:
        self._database = database
        self._metrics = metrics

    def opened(self, opened: Opened) -> None:
        """Do nothing: requests are recorded when they have ended."""

    def completed(self, completed: Completed) -> Awaitable[None] | None:
        """Record a request. The result is done after the commit, so that a client that has the
        whole answer can report its outcome."""
        assignment = completed.opened.assignment
        if assignment is None:
            return None
        self._metrics.completed(completed, assignment)
        values = _values(completed, assignment)
        return self._database.record(
            partial(_insert, experiment=assignment.experiment_id, values=values)
        )


def _insert(connection: Connection, experiment: str, values: Mapping[str, object]) -> None:
    """Insert an exposure once, and only while the experiment exists."""
    there = select(
        *(literal(value, EXPERIMENT_EXPOSURES.c[name].type) for name, value in values.items()),
        EXPERIMENTS.c.id,
    ).where(EXPERIMENTS.c.id == experiment)
    statement = insert(connection, EXPERIMENT_EXPOSURES).from_select([*values, "experiment"], there)
    connection.execute(statement.on_conflict_do_nothing())


def _values(completed: Completed, assignment: Assignment) -> dict[str, object]:
    opened = completed.opened
    return {
        "completion": opened.request_id,
        "variant": assignment.variant,
        "unit": assignment.unit or opened.request_id,
        "by": assignment.by,
        "counted": assignment.counted and completed.ending != "refused",
        "shadow": assignment.shadow,
        "stretch": assignment.stretch,
        "at": opened.at,
        "tenant": opened.caller.tenant,
        "ending": completed.ending,
        "seconds": completed.seconds,
        "first_token": completed.first_token_seconds,
        "prompt_tokens": opened.prompt_tokens,
        "tokens": completed.completion_tokens,
        "drafted": completed.drafted_tokens,
        "accepted": completed.accepted_tokens,
    }
