"""The experiments of this server: a snapshot that is replaced as a whole, and its changes.

Every change is one transaction; other replicas notice it by the revision. HTTP is not known here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

from sqlalchemy import Connection

from quickchange_server.errors import ConflictError
from quickchange_server.experiments import experiment as changes
from quickchange_server.experiments import experiment_records
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.documents import decode
from quickchange_server.experiments.experiment import Experiment, Pointed
from quickchange_server.experiments.experiment_records import Act, Action
from quickchange_server.experiments.layout import SIZE, shares
from quickchange_server.frontend.caller import Caller
from quickchange_server.storage.database import Database
from quickchange_server.storage.revisions import Revisions

Clock = Callable[[], float]
Make = Callable[[Experiment], Experiment]

ID_BYTES = 16

logger = logging.getLogger(__name__)


class Experiments:
    """All experiments, by name. Used on the event loop; reading never waits."""

    def __init__(self, database: Database, revisions: Revisions, clock: Clock = time.time) -> None:
        self._database = database
        self._revisions = revisions
        self._all: Mapping[str, Experiment] = MappingProxyType({})
        self.clock = clock
        revisions.watch(experiment_records.TOPIC, self._load)

    @property
    def all(self) -> Mapping[str, Experiment]:
        """The current snapshot; a change replaces it."""
        return self._all

    def find(self, name: str) -> Experiment | None:
        return self._all.get(name)

    def get(self, name: str) -> Experiment:
        """The experiment with this name. Raises UnknownModelError."""
        found = self._all.get(name)
        if found is None:
            raise experiment_records.unknown(name)
        return found

    async def latest(self, name: str) -> Experiment:
        """The same, with what others have changed up to now. Raises UnavailableError too."""
        await self._revisions.look()
        return self.get(name)

    def shares(self) -> Iterator[tuple[str, str, float]]:
        """(experiment, variant, current share of the units) for the running experiments."""
        now = self.clock()
        for name, experiment in self.all.items():
            if experiment.state == "running":
                layout = experiment.stretches[experiment.stretch(now)].layout
                for variant, points in shares(layout).items():
                    yield name, variant, points / SIZE

    def refuse_name(self, name: str) -> None:
        """Raise ConflictError if an experiment has this name."""
        if name in self._all:
            raise ConflictError(
                f"name: {name!r} is an experiment; choose another name, or delete it first",
                param="name",
            )

    async def create(self, definition: Definition, caller: Caller) -> Experiment:
        """Create an experiment, which runs at once. Raises ConflictError if the name is taken."""
        act = self._act(caller, "create")
        made = changes.created(secrets.token_hex(ID_BYTES), definition, act.at)
        await self._database.write(partial(experiment_records.create, experiment=made, act=act))
        return await self._taken_up(made)

    async def update(
        self,
        name: str,
        caller: Caller,
        edit: Callable[[Definition], Definition],
        version: int | None,
    ) -> Experiment:
        """Edit the definition in the database. Raises UnknownModelError, ConflictError (also if
        the experiment is not at `version`) and InvalidRequestError."""
        act = self._act(caller, "update")

        def make(old: Experiment) -> Experiment:
            return changes.updated(old, edit(old.definition), act.at)

        return await self._change(name, act, make, version)

    async def pause(self, name: str, caller: Caller) -> Experiment:
        act = self._act(caller, "pause")
        return await self._change(name, act, lambda old: changes.paused(old, act.at))

    async def resume(self, name: str, caller: Caller) -> Experiment:
        act = self._act(caller, "resume")
        return await self._change(name, act, lambda old: changes.resumed(old, act.at))

    async def stop(self, name: str, caller: Caller, winner: str | None) -> Experiment:
        act = self._act(caller, "stop")
        return await self._change(name, act, lambda old: changes.stopped(old, winner, act.at))

    async def promote(
        self, name: str, caller: Caller, variant: str, before: Pointed | None, version: int
    ) -> Experiment:
        """Record that the alias moves to `variant`; `before` is its earlier target. Raises
        ConflictError if the experiment is not at `version`."""
        act = self._act(caller, "promote")
        return await self._change(
            name, act, lambda old: changes.promoted(old, variant, before), version
        )

    async def roll_back(self, name: str, caller: Caller) -> Experiment:
        """Record that the last promotion is undone."""
        return await self._change(name, self._act(caller, "rollback"), changes.rolled_back)

    async def delete(self, name: str, caller: Caller) -> Experiment:
        """Delete an experiment with its records; the audit trail stays."""
        act = self._act(caller, "delete")
        gone = await self._database.write(partial(experiment_records.remove, name=name, act=act))
        await self._revisions.take_up()
        return gone

    def _act(self, caller: Caller, action: Action) -> Act:
        return Act(caller, action, self.clock())

    async def _change(
        self, name: str, act: Act, make: Make, version: int | None = None
    ) -> Experiment:
        change = partial(experiment_records.change, name=name, act=act, make=make, version=version)
        return await self._taken_up(await self._database.write(change))

    async def _taken_up(self, changed: Experiment) -> Experiment:
        """Reload the snapshot before the change is acknowledged."""
        await self._revisions.take_up()
        return changed

    async def _load(self) -> None:
        self._all = MappingProxyType(await self._database.read(self._read_all))

    def _read_all(self, connection: Connection) -> dict[str, Experiment]:
        documents = experiment_records.documents(connection)
        found = {name: self._read(name, document) for name, document in documents.items()}
        return {name: one for name, one in found.items() if one is not None}

    def _read(self, name: str, document: str) -> Experiment | None:
        """The experiment, or its earlier value if this version can't read the document.

        A newer replica may have written it; it must not keep other experiments from changing.
        """
        try:
            return decode(document)
        except Exception:
            known = self._all.get(name)
            logger.exception(
                "the experiment %s can't be read, so it %s; was it written by a newer version?",
                name,
                "is not served" if known is None else "stays as it was before its last change",
            )
            return known
