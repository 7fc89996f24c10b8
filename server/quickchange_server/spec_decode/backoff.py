"""Whether drafting has paid lately, by what steps truly took and gave, for each size of batch.

Prices and chances are estimates, and looking for drafts takes time as well. So what steps with
drafting gave a second is held against what the same sequences would have got without; where it is
less, nothing is drafted in batches of that size for a while, which doubles as long as trying again
shows the same. Counted in steps. Knows nothing of who drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.97  # of what earlier steps weigh, at each further one
ENOUGH = 32  # steps seen before anything is concluded
WORTHWHILE = 1.03  # times what there would be without: looking for drafts takes time, too
FIRST_PAUSE = 64  # steps
LONGEST_PAUSE = 2_048


@dataclass(slots=True)
class _Record:
    """Of batches of one size: decayed sums since drafting was last taken up."""

    tokens: float = 0.0
    seconds: float = 0.0
    plain_tokens: float = 0.0
    plain_seconds: float = 0.0
    steps: int = 0
    pause: int = FIRST_PAUSE
    sleeping: int = 0  # steps left without drafting


class Guard:
    """One record a power of two of sequences that decode."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}

    def awake(self, decoding: int) -> bool:
        """Whether a step of so many decoding sequences may draft. To be asked once a step."""
        record = self._record(decoding)
        record.sleeping = max(record.sleeping - 1, 0)
        return not record.sleeping

    def observe(self, decoding: int, tokens: int, seconds: float, plain_seconds: float) -> None:
        """A step that could draft gave `tokens` in `seconds`, drafting included.

        plain_seconds: what it would have taken without drafts, for one token a sequence.
        """
        record = self._record(decoding)
        record.tokens = DECAY * record.tokens + tokens
        record.seconds = DECAY * record.seconds + seconds
        record.plain_tokens = DECAY * record.plain_tokens + decoding
        record.plain_seconds = DECAY * record.plain_seconds + plain_seconds
        record.steps += 1
        if record.steps < ENOUGH:
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

    def _record(self, decoding: int) -> _Record:
        return self._records.setdefault(_size(decoding), _Record())


def _size(decoding: int) -> int:
    return max(decoding - 1, 0).bit_length()
