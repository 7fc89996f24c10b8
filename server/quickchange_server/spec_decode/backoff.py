"""Back-off of drafting: where it has not paid lately, it rests, longer each time.

Costs and acceptance rates are estimates, and looking for drafts takes time as well. So the tokens a
second of steps with drafting are compared with what the same sequences would have got without. If
they are fewer, batches of that size draft nothing for a while, which doubles as long as trying
again shows the same. A drafter none of whose drafts was accepted lately is tried again at a fixed
pace, so as to notice a change. Counted in steps. Knows nothing of models, rows or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cachetools import LRUCache

from quickchange_server.spec_decode.acceptance_rates import KEPT, Drafter

DECAY = 0.97  # factor on the weight of earlier steps, per step
ENOUGH = 256  # tokens without drafts in the steps seen before anything is concluded, and …
FEWEST, MOST = 16, 32  # … steps seen at least, and at most
WORTHWHILE = 1.005  # least gain over no drafting, the time of looking for drafts included
FIRST_PAUSE = 64  # steps
LONGEST_PAUSE = 2_048
RETRY = 64  # steps without an accepted draft of a drafter until it is tried
SPACING = 8  # steps from one trial to the next, over all drafters


@dataclass(slots=True)
class _Record:
    """Results of batches of one size: decayed sums since drafting was last resumed."""

    tokens: float = 0.0
    seconds: float = 0.0
    plain_tokens: float = 0.0
    plain_seconds: float = 0.0
    steps: int = 0
    pause: int = FIRST_PAUSE
    sleeping: int = 0  # steps left without drafting


class Backoff:
    """One record for each power of two of decoding sequences, and the drafters' next trials."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._step = 0
        self._trial_at: LRUCache[Drafter, int] = LRUCache(KEPT)  # steps
        self._trial: tuple[Drafter, int] | None = None  # the last, and the step that verifies it

    def awake(self, decoding: int) -> bool:
        """True if a step of so many decoding sequences may draft. Call it once a step."""
        self._step += 1
        record = self._record(decoding)
        record.sleeping = max(record.sleeping - 1, 0)
        return not record.sleeping

    def observe(self, decoding: int, tokens: int, seconds: float, plain_seconds: float) -> None:
        """Note a step that could draft: `tokens` in `seconds`, drafting included.

        plain_seconds: duration of the same step without drafts, for one token a sequence.
        """
        record = self._record(decoding)
        record.tokens = DECAY * record.tokens + tokens
        record.seconds = DECAY * record.seconds + seconds
        record.plain_tokens = DECAY * record.plain_tokens + decoding
        record.plain_seconds = DECAY * record.plain_seconds + plain_seconds
        record.steps += 1
        if record.steps < min(max(ENOUGH // decoding, FEWEST), MOST):
            return
        gained = record.tokens * record.plain_seconds
        pays = gained >= WORTHWHILE * record.plain_tokens * record.seconds
        if pays:
            record.pause = FIRST_PAUSE
            return
        pause = record.pause
        self._records[_size(decoding)] = _Record(
            pause=min(2 * pause, LONGEST_PAUSE), sleeping=pause
        )

    def due(self, drafters: Iterable[Drafter]) -> Drafter | None:
        """The one of a step's drafters that the next step tries at any cost, if any is due."""
        if self._trial is not None and self._step < self._trial[1] + SPACING - 1:
            return None
        waiting = [(self._trial_at.setdefault(d, self._step + RETRY), d) for d in drafters]
        if not waiting or self._step < min(waiting)[0]:
            return None
        _, drafter = min(waiting)
        self._trial_at[drafter] = self._step + RETRY
        self._trial = drafter, self._step + 1
        return drafter

    def held(self, drafter: Drafter) -> None:
        """Put off a drafter's trial: a draft was accepted. A trial is soon followed by another."""
        pause = SPACING if self._trial == (drafter, self._step) else RETRY
        self._trial_at[drafter] = self._step + pause

    def _record(self, decoding: int) -> _Record:
        return self._records.setdefault(_size(decoding), _Record())


def _size(decoding: int) -> int:
    return max(decoding - 1, 0).bit_length()
