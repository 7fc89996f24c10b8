"""Chooses one token from each row of logits. Token ids in, token ids out; knows nothing of text.

A row's token is a function of its logits, its parameters, its tokens so far and one uniform number,
which depends on (seed, position) alone. Nothing is shared between rows, so the result is the same
in any batch, with or without speculation, and after a restart.

The order: tokens that a constraint forbids masked; logit_bias added; stop ids suppressed while
min_tokens is not reached; repetition penalty over prompt and output (transformers' rule); frequency
and presence penalties over the output (OpenAI's rule); temperature; the filters in the order of
FILTERS (transformers' order, and that of servers with fewer filters); inverse CDF over what is
left, in vocabulary order. The arithmetic is `quickchange_kernels.sampling.sample_contract`; the
tables are made in `inputs/sample_tables.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from quickchange_kernels.sampling.sample_contract import Edits, sample
from quickchange_server.engine.inputs.sample_tables import (
    RowError,
    RowTables,
    SampleColumns,
    SampleRow,
    WantedLogprobs,
    tables_of,
)
from quickchange_server.engine.token_masks import NO_MASKS, TokenMasks
from quickchange_server.model.input_buffers import Download, upload
from quickchange_server.protocol import TokenLogprobs

_TOP_LOGPROBS_STEP = 32  # torch's order of equal values depends on k: all small k use one


class SampledToken(NamedTuple):
    """The token chosen for a row, with logprobs if its parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Picks:
    """Sampled tokens of R rows, and the log-probabilities of the rows that ask for them."""

    table: Tensor  # int64 [2, R]: token, 0 if none can be chosen; soundness
    # float64 [l, 1 + K + 2n] of runs of these rows: the token's, those of K listed tokens, n best
    # ids, n best values
    logprobs: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> Tensor:
        """int64 [R]."""
        return self.table[0]


@dataclass(frozen=True)
class Draw:
    """Sampled tokens of a batch, still on the device."""

    picks: Picks
    _tables: RowTables
    _errors: Mapping[int, RowError]  # known before the draw

    @property
    def tokens(self) -> Tensor:
        """int64 [R]; 0 if no token can be chosen."""
        return self.picks.tokens

    def results(self, picks: Picks | None = None) -> list[SampledToken | RowError]:
        """One result per row. picks: these on the host; None: they are brought there."""
        if picks is None:
            picks = Download(self.picks, self.picks.table.device).tree()
        tokens, sound = picks.table.tolist()
        results: list[SampledToken | RowError] = list(map(SampledToken, tokens))
        if self._tables.asking is not None:
            asking = self._tables.asking.tolist()
            lines = [line for part in picks.logprobs for line in part.tolist()]
            listed = len(asking[0]) - 1
            for (row, *_), line, wanted in zip(asking, lines, self._tables.wanted, strict=True):
                token = tokens[row]
                top = _told(token, line, listed, wanted)
                results[row] = SampledToken(token, TokenLogprobs(token, line[0], top))
        if not all(sound):
            for row, well in enumerate(sound):
                if not well:
                    asked = row in self._tables.narrowed
                    results[row] = RowError(row, _UNSOUND, "request" if asked else "internal")
        for row, error in self._errors.items():
            results[row] = error
        return results


_UNSOUND = (
    "no token can be chosen: the logits hold NaN or infinity, or every token is suppressed by "
    "logit_bias, allowed_token_ids, bad_words and min_tokens"
)


Parts = tuple[SampleColumns, Edits | None, Tensor | None]  # columns, edits, rows with logprobs


class Sampler:
    """Samples rows over one vocabulary on one device. Holds no state between calls."""

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._vocabulary_size = vocabulary_size
        self._device = device

    def tables(self, rows: Sequence[SampleRow]) -> RowTables:
        """Tables of the rows' parameters and tokens, on the host. Raises if a row's don't fit."""
        return tables_of(rows, self._vocabulary_size)

    @torch.inference_mode()
    def pick(self, logits: Tensor, columns: SampleColumns, edits: Edits | None = None) -> Tensor:
        """Token and soundness of each row, int64 [2, R]. All on the device; logits are edited."""
        tokens, sound = sample(logits, columns.draws, edits)
        return torch.stack([tokens, sound.long()])

    @torch.inference_mode()
    def draw(
        self,
        logits: Tensor,
        rows: Sequence[SampleRow] | RowTables,
        masks: TokenMasks = NO_MASKS,
        parts: Parts | None = None,
        picked: Tensor | None = None,
    ) -> Draw:
        """Choose a token for each row (at least one). logits [R, V], overwritten.

        parts: the tables on the device; None: they are sent there. picked: what `pick` made of the
        rows' columns and these logits; None: nothing yet. Raises ValueError if the logits' shape is
        not [rows, vocabulary size].
        """
        tables = rows if isinstance(rows, RowTables) else self.tables(rows)
        if logits.shape != (tables.rows, self._vocabulary_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {tables.rows} rows over a vocabulary "
                f"of {self._vocabulary_size}"
            )
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        if parts is None:
            parts = upload((tables.columns, tables.edits, tables.asking), self._device)
        columns, edits, asking = parts
        own = None  # the model's own log-probabilities: before anything is edited
        if asking is not None:
            own = torch.log_softmax(logits.index_select(0, asking[:, 0]).float(), dim=-1)
        masks.apply_(logits)
        if picked is None or edits is not None or masks.rows.numel():
            picked = self.pick(logits, columns, edits)
        picks = Picks(picked)
        if own is not None and asking is not None:
            chosen = picked[0].index_select(0, asking[:, 0])
            told: list[Tensor] = []
            first = 0
            for length, count in runs_alike([one.best for one in tables.wanted]):
                run = slice(first, first + length)
                told.append(_logprobs(own[run], chosen[run], asking[run, 1:], count))
                first += length
            picks = Picks(picked, tuple(told))
        forbidden = {row: RowError(row, text, "request") for row, text in masks.errors.items()}
        return Draw(picks, tables, {**tables.errors, **forbidden})


def _told(
    token: int, line: Sequence[float], listed: int, wanted: WantedLogprobs
) -> tuple[tuple[int, float], ...]:
    """Log-probabilities that a row asks for besides its token's: of listed tokens, the token among
    them, or of the best."""
    if not wanted.listed:
        return best_first(line[1 + listed :], wanted.best)
    told = dict(zip(wanted.listed, line[1:], strict=False)) | {token: line[0]}
    return tuple(sorted(told.items(), key=lambda pair: (-pair[1], pair[0])))


def best_first(columns: Sequence[float], wanted: int) -> tuple[tuple[int, float], ...]:
    """The `wanted` best (token, log-probability) pairs, from columns of ids, then of values."""
    half = len(columns) // 2
    ranked = sorted(
        ((int(i), value) for i, value in zip(columns[:half], columns[half:], strict=True)),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return tuple(ranked[:wanted])


def runs_alike(wanted: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Runs of rows that torch.topk takes together, as (rows, k), by the best tokens of each row.

    All that want few are alike; none has the width of another that wants many.
    """
    few = _TOP_LOGPROBS_STEP if any(wanted) else 0
    counts = (few if one <= few else -(-one // few) * few for one in wanted)
    return tuple((len(list(run)), count) for count, run in groupby(counts))


def _logprobs(table: Tensor, chosen: Tensor, listed: Tensor, count: int) -> Tensor:
    """float64 [L, 1 + K + 2n] of log-probabilities [L, V]: the chosen token's, those of `listed`
    [L, K], n best ids, n best values; n is `count`, at most V."""
    parts = [table.gather(1, torch.cat([chosen[:, None], listed], dim=1)).double()]
    if count:
        best = table.topk(min(count, table.shape[1]), dim=-1)
        parts += [best.indices.double(), best.values.double()]
    return torch.cat(parts, dim=1)
