"""Chooses one token from each row of logits. Token ids in, token ids out; knows nothing of text.

A row's token is a function of its logits, its parameters, its tokens so far and one uniform number,
which depends on (seed, position) alone. Nothing is shared between rows, so the result is the same
in any batch, with or without speculation, and after a restart.

The order: logit_bias added; stop ids suppressed while min_tokens is not reached; repetition penalty
over prompt and output (transformers' rule); frequency and presence penalties over the output
(OpenAI's rule); temperature; top_k, top_p, min_p; inverse CDF over what is left, in vocabulary
order (draw.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quickchange_server.engine.draw import draw
from quickchange_server.engine.philox import uniform
from quickchange_server.messages import SamplingParams, TokenLogprobs

_NEVER = float("-inf")
_TOP_LOGPROBS_STEP = 32  # torch's order of equal values depends on k: all small k use one


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits and what its token depends on."""

    params: SamplingParams
    position: int  # absolute, from 0: prompt length + output tokens so far
    prompt: Sequence[int]
    output: Sequence[int]  # tokens generated so far


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for a row; logprobs where its parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """No token can be chosen for this row. The other rows of the batch are not touched by it."""

    row: int  # index in the batch
    error: str


class Sampler:
    """Samples rows over one vocabulary on one device. Holds no state between calls."""

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._vocabulary_size = vocabulary_size
        self._device = device

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | RowError]:
        """One result a row. logits [R, V], any float dtype; float32 logits are overwritten.

        Raises ValueError when the logits' shape is not [len(rows), vocabulary size].
        """
        if logits.shape != (len(rows), self._vocabulary_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(rows)} rows over a vocabulary "
                f"of {self._vocabulary_size}"
            )
        if not rows:
            return []
        logits = logits.float().contiguous()
        logprobs = _Logprobs.of(logits, rows)  # the model's own: before anything is edited
        edits = _Edits(self._vocabulary_size)
        for index, row in enumerate(rows):
            edits.add_row(index, row)
        edits.apply(logits)
        tokens, peak = self._choose(logits, rows)
        host = torch.stack([tokens.double(), peak.double()], dim=1)
        if logprobs is not None:
            host = torch.cat([host, logprobs.columns(tokens)], dim=1)
        values = host.tolist()  # the one transfer to the host
        return [
            edits.errors.get(index) or _result(index, row, line)
            for index, (row, line) in enumerate(zip(rows, values, strict=True))
        ]

    def _choose(self, logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [R], and the best logits [R], finite exactly where the row is sound."""
        best = logits.argmax(dim=-1)  # the first of equals; a NaN wins every comparison
        peak = logits.gather(1, best[:, None]).squeeze(1)
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        if not drawn:
            return best, peak
        uniforms = [uniform(rows[i].params.seed, rows[i].position) for i in drawn]
        params = [rows[i].params for i in drawn]
        if len(drawn) == len(rows):
            return draw(logits, params, uniforms), peak
        where = torch.tensor(drawn, device=self._device)
        best[where] = draw(logits[where], params, uniforms)
        return best, peak


def _result(index: int, row: SampleRow, line: list[float]) -> Sampled | RowError:
    """From one line of the host's table: token, best logit, then the log-probabilities' columns."""
    if not math.isfinite(line[1]):
        return RowError(
            index,
            "no token can be chosen: the logits hold NaN or infinity, or every token is "
            "suppressed by logit_bias and min_tokens",
        )
    token = int(line[0])
    wanted = row.params.logprobs
    if wanted is None:
        return Sampled(token)
    chosen, pairs = line[2], line[3:]
    half = len(pairs) // 2
    ranked = sorted(
        ((int(i), value) for i, value in zip(pairs[:half], pairs[half:], strict=True)),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return Sampled(token, TokenLogprobs(token, chosen, tuple(ranked[:wanted])))


class _Edits:
    """Changes to single logits of a batch, gathered on the host and applied in few operations."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self.errors: dict[int, RowError] = {}
        self._added = _Cells()  # value: the bias
        self._suppressed = _Cells()
        self._repeated = _Cells()  # value: the repetition penalty
        self._subtracted = _Cells()  # value: what frequency and presence take off

    def add_row(self, index: int, row: SampleRow) -> None:
        params, output = row.params, row.output
        if params.logit_bias:
            self._add_bias(index, params.logit_bias)
        if len(output) < params.min_tokens:
            inside = [i for i in params.stop_token_ids if 0 <= i < self._vocabulary_size]
            self._suppressed.extend(index, inside, [_NEVER] * len(inside))
        if params.repetition_penalty != 1.0:
            seen = list(set(row.prompt).union(output))
            self._repeated.extend(index, seen, [params.repetition_penalty] * len(seen))
        if output and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
            counts = Counter(output)
            self._subtracted.extend(
                index,
                list(counts),
                [params.frequency_penalty * n + params.presence_penalty for n in counts.values()],
            )

    def apply(self, logits: Tensor) -> None:
        """In place on float32 logits [R, V]. No token appears twice in a kind, so none is lost."""
        flat = logits.view(-1)
        if self._added.rows:
            at, values = self._added.tensors(logits)
            flat[at] += values
        if self._suppressed.rows:
            at, values = self._suppressed.tensors(logits)
            flat[at] = values
        if self._repeated.rows:
            at, penalty = self._repeated.tensors(logits)
            now = flat[at]
            flat[at] = torch.where(now < 0, now * penalty, now / penalty)
        if self._subtracted.rows:
            at, values = self._subtracted.tensors(logits)
            flat[at] -= values

    def _add_bias(self, index: int, bias: Sequence[tuple[int, float]]) -> None:
        totals: dict[int, float] = {}
        for token, value in bias:
            if not 0 <= token < self._vocabulary_size:
                self.errors[index] = RowError(
                    index,
                    f"logit_bias names token {token}; the vocabulary has {self._vocabulary_size}",
                )
                return
            totals[token] = totals.get(token, 0.0) + value
        self._added.extend(index, list(totals), list(totals.values()))


class _Cells:
    """A list of (row, token, value)."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._tokens: list[int] = []
        self._values: list[float] = []

    def extend(self, row: int, tokens: Sequence[int], values: Sequence[float]) -> None:
        self.rows.extend([row] * len(tokens))
        self._tokens.extend(tokens)
        self._values.extend(values)

    def tensors(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Flat indices int64 [N] into `logits` [R, V], and the values float32 [N]."""
        rows = np.asarray(self.rows, dtype=np.int64)
        flat = rows * logits.shape[1] + np.asarray(self._tokens, dtype=np.int64)
        values = torch.tensor(self._values, dtype=torch.float32)
        return torch.from_numpy(flat).to(logits.device), values.to(logits.device)


class _Logprobs:
    """The model's log-probabilities of the rows that ask for them."""

    def __init__(self, rows: Tensor, table: Tensor, count: int, batch: int) -> None:
        self._rows = rows  # int64 [L]
        self._table = table  # [L, V]
        self._count = count  # best tokens wanted by any row
        self._batch = batch

    @classmethod
    def of(cls, logits: Tensor, rows: Sequence[SampleRow]) -> _Logprobs | None:
        """None where no row asks for them."""
        asking = [(i, n) for i, row in enumerate(rows) if (n := row.params.logprobs) is not None]
        if not asking:
            return None
        where = torch.tensor([i for i, _ in asking], device=logits.device)
        most = max(n for _, n in asking)
        stepped = -(-most // _TOP_LOGPROBS_STEP) * _TOP_LOGPROBS_STEP
        table = torch.log_softmax(logits[where], dim=-1)
        return cls(where, table, min(stepped, logits.shape[1]), len(rows))

    def columns(self, tokens: Tensor) -> Tensor:
        """float64 [R, 1 + 2n]: the chosen token's log-probability, n best ids, n best values.

        Rows that did not ask hold zeros. An unsound row's token may lie outside the vocabulary.
        """
        columns = torch.zeros(
            self._batch, 1 + 2 * self._count, dtype=torch.float64, device=tokens.device
        )
        chosen = tokens[self._rows].clamp(max=self._table.shape[1] - 1)[:, None]
        parts = [self._table.gather(1, chosen).double()]
        if self._count:
            best = self._table.topk(self._count, dim=-1)
            parts += [best.indices.double(), best.values.double()]
        columns[self._rows] = torch.cat(parts, dim=1)
        return columns
