"""The bookkeeper of experiments: each assigned request, and what it came to."""

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
    """Records every request that was assigned, when it has ended."""

    def __init__(self, database: Database, metrics: ExperimentMetrics) -> None:
        self._database = database
        self._metrics = metrics

    def opened(self, opened: Opened) -> None:
        """Nothing is refused here, and nothing recorded before the end."""

    def completed(self, completed: Completed) -> Awaitable[None] | None:
        """Record it. Done after the commit: who has the whole answer can tell its outcome."""
        assignment = completed.opened.assignment
        if assignment is None:
            return None
        self._metrics.completed(completed, assignment)
        values = _values(completed, assignment)
        return self._database.record(
            partial(_insert, experiment=assignment.experiment_id, values=values)
        )


def _insert(connection: Connection, experiment: str, values: Mapping[str, object]) -> None:
    """Once, and only while the experiment exists."""
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
