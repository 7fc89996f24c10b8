"""What some requests read of their own prompt: its tokens' log-probabilities, or an embedding.

Rows are read in order and each once, also where the prompt is computed in chunks, or anew after a
preemption. Knows nothing of devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quickchange_server.messages import Pooling, Submit, TokenLogprobs

Doubles = npt.NDArray[np.float64]


class Reading:
    """One request's. Row i is that of the prompt's token i, whose logits judge token i + 1."""

    def __init__(self, length: int, top: int | None, pooling: Pooling | None) -> None:
        """length: of the prompt, in tokens. top: log-probabilities are read, with so many of the
        best tokens; None: an embedding is, by `pooling`."""
        self.top = top
        self.done = length - 1 if pooling == "last" else 0  # rows before it need no reading
        self._end = length if top is None else length - 1
        self._pooled = self._end - self.done
        self.sound = True  # whether all that was read is finite
        self._scores: list[TokenLogprobs] = []
        self._sum: Doubles | None = None

    @classmethod
    def of(cls, submit: Submit) -> Reading | None:
        """What a submission still reads: one with output has told its prompt's before."""
        if submit.pooling is not None:
            return cls(len(submit.prompt), None, submit.pooling)
        if submit.prompt_logprobs is None or submit.output:
            return None
        return cls(len(submit.prompt), submit.prompt_logprobs, None)

    @property
    def complete(self) -> bool:
        return self.done >= self._end

    @property
    def scores(self) -> tuple[TokenLogprobs, ...]:
        """Of the prompt's tokens but the first, as far as read."""
        return tuple(self._scores)

    @property
    def embedding(self) -> bytes | None:
        """float32 little-endian [H], once complete; None where log-probabilities are read."""
        if self._sum is None or not self.complete:
            return None
        return (self._sum / self._pooled).astype("<f4").tobytes()

    def rows(self, first: int, count: int) -> range:
        """Which of the rows [first, first + count) are to be read now."""
        return range(max(first, self.done), min(first + count, self._end))

    def add_scores(self, scores: Sequence[TokenLogprobs]) -> None:
        """Those of the next rows."""
        self.sound &= all(math.isfinite(score.logprob) for score in scores)
        self._scores += scores
        self.done += len(scores)

    def add_states(self, total: Doubles, rows: int) -> None:
        """The sum [H] of the next rows' hidden states."""
        self.sound &= bool(np.isfinite(total).all())
        self._sum = total if self._sum is None else self._sum + total
        self.done += rows
