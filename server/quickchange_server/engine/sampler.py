"""Chooses one token from each row of logits. Token ids in, token ids out; knows nothing of text.

A row's token is a function of its logits, its parameters, its tokens so far and one uniform number,
which depends on (seed, position) alone. Nothing is shared between rows, so the result is the same
in any batch, with or without speculation, and after a restart.

The order: tokens that a constraint forbids masked; logit_bias added; stop ids suppressed while
min_tokens is not reached; repetition penalty over prompt and output (transformers' rule); frequency
and presence penalties over the output (OpenAI's rule); temperature; the filters in the order of
FILTERS (transformers' order, and that of servers with fewer filters); inverse CDF over what is
left, in vocabulary order. The arithmetic is `quickchange_kernels.sampling.sample_contract`; this
module makes its tables from parameters and tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.sampling.philox import uniforms
from quickchange_kernels.sampling.sample_contract import EDITS, FILTERS, Draws, Edits, sample
from quickchange_server.engine.token_masks import NO_MASKS, TokenMasks
from quickchange_server.protocol import SamplingParams, TokenLogprobs

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_NEVER = float("-inf")
_OFF = {name: getattr(SamplingParams(), name) for name in FILTERS}
_TOP_LOGPROBS_STEP = 32  # torch's order of equal values depends on k: all small k use one


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Parameters, seed and tokens that a row's token depends on, besides its logits."""

    params: SamplingParams
    seed: int
    position: int  # absolute, from 0: prompt length + output tokens so far
    prompt: Sequence[int]
    output: Sequence[int]  # tokens generated so far


class SampledToken(NamedTuple):
    """The token chosen for a row, with logprobs if its parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class RowError(NamedTuple):
    """A row for which no token can be chosen. Other rows of the batch are not affected."""

    row: int  # index in the batch
    error: str
    kind: Literal["internal", "request"] = "internal"  # party at fault


@dataclass(frozen=True)
class Draw:
    """Sampled tokens of a batch, still on the device."""

    tokens: Tensor  # int64 [R]; 0 if no token can be chosen
    table: Tensor  # float64 [R, 2 or more]: token, soundness, log-probability columns
    _rows: Sequence[SampleRow]
    _errors: Mapping[int, RowError]  # known before the draw

    def results(self, table: Tensor | None = None) -> list[SampledToken | RowError]:
        """One result per row. table: the draw's own, if it has come to the host."""
        lines = (self.table if table is None else table).tolist()
        return [
            self._errors.get(index) or _result(index, row, line)
            for index, (row, line) in enumerate(zip(self._rows, lines, strict=True))
        ]


class Sampler:
    """Samples rows over one vocabulary on one device. Holds no state between calls."""

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._vocabulary_size = vocabulary_size
        self._device = device

    def tables(self, rows: Sequence[SampleRow]) -> RowTables:
        """Tables of the rows' parameters and tokens, on the host. Raises if a row's don't fit."""
        changes = _EditTable(self._vocabulary_size)
        for row in rows:
            changes.add_row(row)
        return RowTables(rows, _columns(rows, self._vocabulary_size), changes)

    @torch.inference_mode()
    def draw(
        self, logits: Tensor, rows: Sequence[SampleRow] | RowTables, masks: TokenMasks = NO_MASKS
    ) -> Draw:
        """Choose a token for each row (at least one). logits [R, V], overwritten.

        Raises ValueError if the logits' shape is not [rows, vocabulary size].
        """
        tables = rows if isinstance(rows, RowTables) else self.tables(rows)
        rows = tables.rows
        if logits.shape != (len(rows), self._vocabulary_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(rows)} rows over a vocabulary "
                f"of {self._vocabulary_size}"
            )
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        logprobs = _Logprobs.of(logits, rows)  # the model's own: before anything is edited
        masks.apply_(logits)
        edits = tables.edits.on(self._device)
        tokens, sound = sample(logits, tables.draws(self._device), edits)
        table = torch.stack([tokens.double(), sound.double()], dim=1)
        if logprobs is not None:
            table = torch.cat([table, logprobs.columns(tokens)], dim=1)
        forbidden = {row: RowError(row, text, "request") for row, text in masks.errors.items()}
        return Draw(tokens, table, rows, tables.edits.errors | forbidden)


@dataclass(frozen=True, slots=True)
class RowTables:
    """Rows, and what the operation reads of their parameters and tokens, on the host."""

    rows: Sequence[SampleRow]
    columns: Mapping[str, Tensor]  # float64 [R] each; empty: all rows are greedy
    edits: _EditTable

    def draws(self, device: torch.device) -> Draws:
        """The columns on the device, sent in one transfer."""
        if not self.columns:
            return Draws()
        table = torch.stack(list(self.columns.values())).to(device)
        return Draws(**dict(zip(self.columns, table, strict=True)))


def _columns(rows: Sequence[SampleRow], vocabulary: int) -> dict[str, Tensor]:
    """Parameters of the rows by name; a filter that no row uses is left out."""
    params = [row.params for row in rows]
    if not any(p.temperature for p in params):
        return {}
    columns: dict[str, Tensor] = {
        "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float64),
        "uniform": uniforms([row.seed for row in rows], [row.position for row in rows]),
    }
    for name, off in _OFF.items():
        # A whole number of any size may come here, and one past the vocabulary is off.
        values = [min(getattr(p, name), vocabulary) for p in params]
        if any(value != off for value in values):
            columns[name] = torch.tensor(values, dtype=torch.float64)
    return columns


def _result(index: int, row: SampleRow, line: list[float]) -> SampledToken | RowError:
    """Result of a row. line: token, soundness, then the log-probability columns."""
    if not line[1]:
        return RowError(
            index,
            "no token can be chosen: the logits hold NaN or infinity, or every token is "
            "suppressed by logit_bias and min_tokens",
        )
    token = int(line[0])
    wanted = row.params.logprobs
    if wanted is None:
        return SampledToken(token)
    return SampledToken(token, TokenLogprobs(token, line[2], best_first(line[3:], wanted)))


def best_first(columns: Sequence[float], wanted: int) -> tuple[tuple[int, float], ...]:
    """The `wanted` best (token, log-probability) pairs, from columns of ids, then of values."""
    half = len(columns) // 2
    ranked = sorted(
        ((int(i), value) for i, value in zip(columns[:half], columns[half:], strict=True)),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return tuple(ranked[:wanted])


def top_count(wanted: int, vocabulary: int) -> int:
    """The k of torch.topk for the `wanted` best tokens: `wanted` rounded up, at most V."""
    return min(-(-wanted // _TOP_LOGPROBS_STEP) * _TOP_LOGPROBS_STEP, vocabulary)


class _EditTable:
    """Logit edits of the rows, in the operation's order: row by row, kind by kind."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self.errors: dict[int, RowError] = {}
        self._begin = [0]
        self._tokens: list[Ints] = []
        self._values: list[Floats] = []

    def add_row(self, row: SampleRow) -> None:
        """Append the edits of the next row."""
        params, output = row.params, row.output
        self._add(self._bias(params.logit_bias))
        suppressed = params.stop_token_ids if len(output) < params.min_tokens else ()
        self._add({i: _NEVER for i in suppressed if 0 <= i < self._vocabulary_size})
        penalty = params.repetition_penalty
        self._add(dict.fromkeys({*row.prompt, *output}, penalty) if penalty != 1.0 else {})
        self._add(_counted(output, params.frequency_penalty, params.presence_penalty))

    def on(self, device: torch.device) -> Edits | None:
        """The table on the device; None if no logit changes."""
        if not self._tokens:
            return None
        parts = (
            np.array(self._begin, dtype=np.int32),
            np.concatenate(self._tokens),
            np.concatenate(self._values),
        )
        return Edits(*(torch.from_numpy(part).to(device) for part in parts))

    def _add(self, changes: Mapping[int, float]) -> None:
        """Append one kind of edit: a value for each token."""
        if changes:
            self._tokens.append(np.fromiter(changes, dtype=np.int32, count=len(changes)))
            self._values.append(np.fromiter(changes.values(), dtype=np.float32, count=len(changes)))
        self._begin.append(self._begin[-1] + len(changes))

    def _bias(self, bias: Mapping[int, float]) -> Mapping[int, float]:
        for token in bias:
            if not 0 <= token < self._vocabulary_size:
                index = (len(self._begin) - 1) // len(EDITS)
                self.errors[index] = RowError(
                    index,
                    f"logit_bias names token {token}; the vocabulary has {self._vocabulary_size}",
                )
                return {}
        return bias


def _counted(output: Sequence[int], frequency: float, presence: float) -> dict[int, float]:
    """Frequency and presence penalty of each token in the output."""
    if frequency == 0.0 and presence == 0.0:
        return {}
    return {token: frequency * n + presence for token, n in Counter(output).items()}


class _Logprobs:
    """The model's own log-probabilities of the rows that ask for them."""

    def __init__(self, rows: Tensor, table: Tensor, count: int, batch: int) -> None:
        self._rows = rows  # int64 [L]
        self._table = table  # [L, V]
        self._count = count  # best tokens wanted by any row
        self._batch = batch

    @classmethod
    def of(cls, logits: Tensor, rows: Sequence[SampleRow]) -> _Logprobs | None:
        """Log-probabilities of `logits` [R, V]; None if no row asks for them."""
        asking = [(i, n) for i, row in enumerate(rows) if (n := row.params.logprobs) is not None]
        if not asking:
            return None
        where = torch.tensor([i for i, _ in asking], device=logits.device)
        most = max(n for _, n in asking)
        table = torch.log_softmax(logits[where].float(), dim=-1)
        return cls(where, table, top_count(most, logits.shape[1]), len(rows))

    def columns(self, tokens: Tensor) -> Tensor:
        """float64 [R, 1 + 2n]: the chosen token's log-probability, n best ids, n best values.

        Rows that did not ask hold zeros.
        """
        columns = torch.zeros(
            self._batch, 1 + 2 * self._count, dtype=torch.float64, device=tokens.device
        )
        chosen = tokens[self._rows][:, None]
        parts = [self._table.gather(1, chosen).double()]
        if self._count:
            best = self._table.topk(self._count, dim=-1)
            parts += [best.indices.double(), best.values.double()]
        columns[self._rows] = torch.cat(parts, dim=1)
        return columns
