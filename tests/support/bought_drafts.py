"""Drafting as if drafts cost nothing: every one for which there is room is verified.

What a draft is worth hangs on the machine's mood; whether output changes must not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from quickchange_server.config import Settings
from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.spec_decode import speculator
from quickchange_server.spec_decode.backoff import Backoff
from quickchange_server.spec_decode.draft_depth import DepthPlan, Prospect
from quickchange_server.spec_decode.draft_selection import Purchase, StepLoad


@contextmanager
def every_draft_bought() -> Iterator[None]:
    """No price, no depth that doesn't pay, no rest while steps are slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator, "buy_chains", _whole_chains)
        patch.setattr(DepthPlan, "depths", _deepest)
        patch.setattr(Backoff, "awake", lambda _backoff, _decoding: True)
        yield


def buying_main(main: EngineMain, connection: Connection, settings: Settings) -> None:
    """Main function of an engine's process, `main`, that buys every draft."""
    with every_draft_bought():
        main(connection, settings)


def _whole_chains(
    chances: Sequence[Sequence[float]], load: StepLoad, cost: object, *, trial: int | None = None
) -> Purchase:
    """The first ones first, as long as there is room."""
    del cost, trial
    lengths, room = [], load.cap
    for chain in chances:
        lengths.append(min(len(chain), room))
        room -= lengths[-1]
    return Purchase(tuple(lengths), 0.0)


def _deepest(plan: DepthPlan, prospects: Sequence[Prospect], load: StepLoad) -> tuple[int, ...]:
    """All heads that there are."""
    del plan, load
    return tuple(prospect.deepest for prospect in prospects)
