"""What an experiment came to, as JSON: sums from the database, inference by `statistics`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from quickchange_server.experiments.experiment import Experiment
from quickchange_server.experiments.statistics.analysis import analyse
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_server.experiments.sums import Tally, tally
from quickchange_server.storage.database import Database


async def results_of(database: Database, experiment: Experiment) -> dict[str, Any]:
    """The results now. Neither the sums nor the inference hold up the event loop."""
    sums = await database.read(partial(tally, experiment=experiment))
    return await asyncio.to_thread(_results, experiment, sums)


def _results(experiment: Experiment, sums: Tally) -> dict[str, Any]:
    told = len(sums.outcomes)
    analysed = analyse(
        sums.order, [*sums.outcomes, *sums.automatic], sums.stretches, plan_of(experiment)
    ).to_json()
    every = analysed.pop("outcomes")
    return {
        "id": experiment.name,
        "object": "experiment.results",
        "version": experiment.version,
        "state": experiment.state,
        "control": sums.order[0],
        "minimum": experiment.definition.minimum,
        **analysed,
        "outcomes": every[:told],
        "automatic": every[told:],
        "requests": sums.requests,
        "shadows": {
            variant: {
                name: {"count": s.count, "mean": s.total / s.count if s.count else None}
                for name, s in measures.items()
            }
            for variant, measures in sums.shadows.items()
        },
    }


def plan_of(experiment: Experiment) -> Plan:
    """What the definition holds fixed from the start."""
    minimum = experiment.definition.minimum
    uneven = max(minimum, Plan().minimum_units_uneven)
    return Plan(
        alpha=experiment.definition.alpha, minimum_units=minimum, minimum_units_uneven=uneven
    )
