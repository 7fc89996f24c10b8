"""Results of a launched step: what comes down from the device, and what is made of it.

All of it comes in one copy, for which `Flight.ran` waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from quickchange_server.engine.inputs.sample_tables import RowError
from quickchange_server.engine.prompt_outputs import ReadRows, pass_on
from quickchange_server.engine.sampler import Draw, Picks, SampledToken
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.input_buffers import Download
from quickchange_server.spec_decode.cost_model import Stopwatch
from quickchange_server.spec_decode.draft_heads import DraftItem, Drafts


class Result(NamedTuple):
    """Tokens and new drafts of one sampling item."""

    # By row, down to the first rejected draft's.
    sampled: tuple[SampledToken | RowError, ...]
    drafts: tuple[tuple[int, float], ...]  # (token, probability) from the heads, for after these


@dataclass(frozen=True, slots=True)
class Ran:
    """A step's results, one for each sampling item in the plan's order, and its durations.

    `faults`: by request id, errors that belong to one item, which was left out; its result, if it
    samples, is an error too.
    """

    results: list[Result]
    seconds: float | None = None  # forward pass and sampling; None if nobody waits for their end
    draft_seconds: float | None = None  # heads; None if none ran
    mask_seconds: float | None = None  # token masks, on the host; None if there were none
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Landing:
    """All that a step brings to the host."""

    picks: Picks | None = None
    accepted: Tensor | None = None  # int32 [S] drafts accepted; None: nothing was drafted
    drafts: Drafts | None = None  # of the heads
    read: ReadRows | None = None  # of prompts


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step.

    `faults`: by request id, errors of single items that the launch has met; the items may not have
    been computed.
    """

    plan: Sequence[Scheduled]
    faults: dict[str, str]
    _computed: Sequence[Scheduled] = ()  # the items of the plan that were
    _landing: Download[Landing] | None = None  # None: nothing comes down
    _draw: Draw | None = None
    _drafting: Sequence[DraftItem] = ()
    _watch: Stopwatch | None = None
    _mask_seconds: float | None = None

    def ran(self) -> Ran:
        """The results, once the device has got so far. To be called once."""
        landed = Landing() if self._landing is None else self._landing.tree()
        if landed.read is not None:
            pass_on(self._computed, landed.read, self.faults)
        if self._draw is None or self._watch is None:
            return Ran(self._results({}), faults=self.faults)
        results = self._results(self._drawn(self._draw, landed))
        seconds, draft_seconds = self._watch.seconds()
        drafts_took = draft_seconds if self._drafting else None
        return Ran(results, seconds, drafts_took, self._mask_seconds, self.faults)

    def _drawn(self, draw: Draw, landed: Landing) -> dict[str, Result]:
        """Results of the drawn items by request id."""
        rows = draw.results(landed.picks)
        ahead = _ahead(self._drafting, landed.drafts)
        sampling = [item for item in self._computed if item.samples]
        if landed.accepted is None:
            return {
                item.sequence.request_id: Result((own,), ahead.get(at, ()))
                for at, (item, own) in enumerate(zip(sampling, rows, strict=True))
            }
        results = {}
        first = 0
        for at, (item, held) in enumerate(zip(sampling, landed.accepted.tolist(), strict=True)):
            sampled = tuple(rows[first : first + held + 1])
            results[item.sequence.request_id] = Result(sampled, ahead.get(at, ()))
            first += item.sampled_rows
        return results

    def _results(self, drawn: Mapping[str, Result]) -> list[Result]:
        """Results of all sampling items: of those drawn, by request id, and the others' errors."""
        ids = [item.sequence.request_id for item in self.plan if item.samples]
        if not self.faults:
            return [drawn[i] for i in ids]
        errors = {i: Result((RowError(0, at, "request"),), ()) for i, at in self.faults.items()}
        return [errors.get(i) or drawn[i] for i in ids]


def _ahead(
    items: Sequence[DraftItem], drafts: Drafts | None
) -> dict[int, tuple[tuple[int, float], ...]]:
    """(token, probability) by depth, keyed by the index among the sampling items."""
    if drafts is None:
        return {}
    tokens, chances = drafts.tokens.tolist(), drafts.chances.tolist()
    return {
        item.row: tuple(zip(own_tokens, own_chances, strict=True))[: item.depth]
        for item, own_tokens, own_chances in zip(items, tokens, chances, strict=True)
    }
