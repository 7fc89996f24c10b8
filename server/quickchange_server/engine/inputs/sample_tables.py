"""What sampling reads of parameters and tokens, as tables on the host.

Columns of parameters stay from step to step while the batch's sequences do: only the random numbers
are made anew. Edits of single logits are made for the rows whose parameters have any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.sampling.philox import philox_keys, uniforms
from quickchange_kernels.sampling.sample_contract import EDITS, FILTERS, Draws, Edits
from quickchange_server.protocol import SamplingParams, Submit

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

COLUMNS = ("temperature", "uniform", *FILTERS)
_UNIFORM = COLUMNS.index("uniform")
_NEVER = float("-inf")
_OFF = {name: getattr(SamplingParams(), name) for name in FILTERS}


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Parameters, seed and tokens that a row's token depends on, besides its logits."""

    params: SamplingParams
    seed: int
    position: int  # absolute, from 0: prompt length + output tokens so far
    prompt: Sequence[int]
    output: Sequence[int]  # tokens generated so far
    bad_tokens: Sequence[Sequence[int]] = ()  # runs of tokens that the output must not hold


class RowError(NamedTuple):
    """A row for which no token can be chosen. Other rows of the batch are not affected."""

    row: int  # index in the batch
    error: str
    kind: Literal["internal", "request"] = "internal"  # party at fault


@dataclass(frozen=True, slots=True)
class SampleColumns:
    """Columns of R rows, by name."""

    table: Tensor  # float64 [columns, R]
    names: tuple[str, ...]

    @classmethod
    def greedy(cls, rows: int) -> SampleColumns:
        """All columns, of rows that take their best logit."""
        return cls(torch.zeros(len(COLUMNS), rows, dtype=torch.float64), COLUMNS)

    @property
    def draws(self) -> Draws:
        return Draws(**dict(zip(self.names, self.table, strict=True)))


class WantedLogprobs(NamedTuple):
    """Log-probabilities that a row asks for besides its token's: of tokens, or of the best ones."""

    best: int
    listed: tuple[int, ...] = ()


def _wanted(params: SamplingParams) -> WantedLogprobs | None:
    if params.logprobs is None:
        return None
    listed = tuple(params.logprob_token_ids)
    return WantedLogprobs(0 if listed else params.logprobs, listed)


def _asking(rows: Sequence[int], wanted: Sequence[WantedLogprobs]) -> Tensor | None:
    """`RowTables.asking`."""
    if not rows:
        return None
    width = max(len(one.listed) for one in wanted)
    table = np.zeros((len(rows), 1 + width), dtype=np.int64)
    table[:, 0] = rows
    for line, one in zip(table, wanted, strict=True):
        line[1 : 1 + len(one.listed)] = one.listed
    return torch.from_numpy(table)


@dataclass(frozen=True, slots=True)
class RowTables:
    """Tables of R rows on the host, and what is known of the rows before their tokens are."""

    rows: int
    columns: SampleColumns
    edits: Edits | None = None
    # int64 [L, 1 + K]: rows whose log-probabilities are wanted, each followed by the tokens that it
    # lists (padded with 0); None: none.
    asking: Tensor | None = None
    wanted: Sequence[WantedLogprobs] = ()  # what each of these asks for
    narrowed: frozenset[int] = frozenset()  # rows whose request may leave them no token
    errors: Mapping[int, RowError] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """True if tokens follow from the columns and the logits alone."""
        return self.edits is None and self.asking is None


def tables_of(rows: Sequence[SampleRow], vocabulary: int) -> RowTables:
    """Tables of single rows."""
    params = [row.params for row in rows]
    asking = [(at, own) for at, p in enumerate(params) if (own := _wanted(p)) is not None]
    wanted = [own for _, own in asking]
    table = _parameters(params, vocabulary)
    parts = _Parts(
        table,
        _used(table),
        philox_keys([row.seed for row in rows]),
        _asking([at for at, _ in asking], wanted),
        wanted,
        frozenset(at for at, row in enumerate(rows) if _narrows(row.params)),
    )
    edited = {at: row for at, row in enumerate(rows) if _edits(row.params)}
    positions = np.array([row.position for row in rows], dtype=np.int64)
    return parts.tables(positions, edited, vocabulary, every=False)


class SampledSequence(Protocol):
    """A sequence whose next tokens are sampled."""

    request: Submit
    tokens: list[int]  # prompt and output
    virtual: int  # virtual tokens in front of them, which `first` counts


class SampledItem(Protocol):
    """Rows of one sequence that are sampled: its last token's and those of its drafts."""

    @property
    def sequence(self) -> SampledSequence: ...

    @property
    def first(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def drafts(self) -> tuple[int, ...]: ...

    @property
    def sampled_rows(self) -> int: ...


class BatchTables:
    """Tables of a batch's rows from step to step."""

    def __init__(self, vocabulary: int, *, every: bool) -> None:
        """every: give all columns in every step, so that the device always runs the same kernels;
        else only those of parameters that some row uses."""
        self._vocabulary = vocabulary
        self._every = every
        self._batch = _Batch.of((), vocabulary)

    def of(self, items: Sequence[SampledItem]) -> RowTables:
        """Tables of the items' sampled rows, in their order. Raises if an item's don't fit."""
        if not self._batch.is_of(items):
            self._batch = _Batch.of(items, self._vocabulary)
        batch = self._batch
        known = [item.first + item.count - item.sequence.virtual for item in items]
        positions = np.array(known, dtype=np.int64)
        if batch.owners is not None:
            positions = positions[batch.owners] + batch.depths
        edited = {
            first + depth: _sample_row(items[at], known[at] + depth)
            for first, at in batch.edited
            for depth in range(items[at].sampled_rows)
        }
        return batch.parts.tables(positions, edited, self._vocabulary, every=self._every)


class _Parts(NamedTuple):
    """What stays of rows' tables from step to step."""

    table: Doubles  # [COLUMNS, R], the random numbers aside
    used: list[int]  # columns that some row uses
    keys: npt.NDArray[np.int64]
    asking: Tensor | None
    wanted: list[WantedLogprobs]
    narrowed: frozenset[int]

    def tables(
        self,
        positions: npt.NDArray[np.int64],
        edited: Mapping[int, SampleRow],
        vocabulary: int,
        *,
        every: bool,
    ) -> RowTables:
        rows = len(positions)
        changes = _EditTable(vocabulary)
        if edited:
            for row in range(rows):
                changes.add_row(edited.get(row))
        return RowTables(
            rows,
            self._columns(positions, every=every),
            changes.edits(),
            self.asking,
            self.wanted,
            self.narrowed,
            changes.errors,
        )

    def _columns(self, positions: npt.NDArray[np.int64], *, every: bool) -> SampleColumns:
        if not every and not self.used:  # all rows are greedy
            return SampleColumns(torch.empty(0, len(positions), dtype=torch.float64), ())
        names, table = COLUMNS, self.table.copy()
        table[_UNIFORM] = uniforms(self.keys, positions)
        if not every:
            names, table = tuple([COLUMNS[at] for at in self.used]), table[self.used]
        return SampleColumns(torch.from_numpy(table), names)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of a batch's sequences, as far as they stay while it has the same sequences."""

    sequences: list[SampledSequence]
    counts: list[int]  # sampled rows
    parts: _Parts
    owners: npt.NDArray[np.intp] | None  # [R] each row's item; None: one row each
    depths: npt.NDArray[np.int64]  # [R] drafts before each row
    edited: list[tuple[int, int]]  # (first row, number) of the items whose logits are edited

    @classmethod
    def of(cls, items: Sequence[SampledItem], vocabulary: int) -> _Batch:
        sequences = [item.sequence for item in items]
        counts = [item.sampled_rows for item in items]
        params = [sequence.request.sampling for sequence in sequences]
        owners = np.repeat(np.arange(len(items)), counts)
        starts = np.cumsum([0, *counts])[: len(items)]
        asking: list[int] = []
        wanted: list[WantedLogprobs] = []
        narrowed: set[int] = set()
        for first, count, own in zip(starts.tolist(), counts, params, strict=True):
            rows = range(first, first + count)
            if (asked := _wanted(own)) is not None:
                asking += rows
                wanted += [asked] * count
            if _narrows(own):
                narrowed.update(rows)
        table = _parameters(params, vocabulary)[:, owners]
        keys = philox_keys([sequence.request.seed for sequence in sequences])[owners]
        return cls(
            sequences,
            counts,
            _Parts(table, _used(table), keys, _asking(asking, wanted), wanted, frozenset(narrowed)),
            None if len(owners) == len(items) else owners,
            np.arange(len(owners)) - starts[owners],
            [(int(starts[at]), at) for at, own in enumerate(params) if _edits(own)],
        )

    def is_of(self, items: Sequence[SampledItem]) -> bool:
        return self.sequences == [item.sequence for item in items] and self.counts == [
            item.sampled_rows for item in items
        ]


def _parameters(params: Sequence[SamplingParams], vocabulary: int) -> Doubles:
    """float64 [COLUMNS, R] of the rows' parameters; greedy rows use no filter."""
    table = np.zeros((len(COLUMNS), len(params)))
    table[0] = np.array([p.temperature for p in params], dtype=np.float64)
    greedy = ~(table[0] > 0)
    for at, name in enumerate(COLUMNS):
        if name in _OFF:
            # A whole number of any size may come here, and one past the vocabulary is off.
            values = [min(getattr(p, name), vocabulary) for p in params]
            table[at] = np.array(values, dtype=np.float64)
            table[at, greedy] = _OFF[name]
    return table


def _used(table: Doubles) -> list[int]:
    """Columns that some row uses; none if all rows are greedy."""
    used = [at for at, name in enumerate(COLUMNS) if (table[at] != _OFF.get(name, 0)).any()]
    return sorted({*used, _UNIFORM}) if 0 in used else []


def _edits(params: SamplingParams) -> bool:
    """True if some row under these parameters may have edited logits."""
    return bool(
        params.logit_bias
        or params.bad_words
        or (params.min_tokens and params.stop_token_ids)
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _narrows(params: SamplingParams) -> bool:
    """True if these parameters may suppress every token."""
    return bool(params.allowed_token_ids or params.bad_words)


def _sample_row(item: SampledItem, end: int) -> SampleRow:
    """The row behind `end` tokens, as if all drafts among them were accepted."""
    sequence = item.sequence
    request, prompt = sequence.request, len(sequence.request.prompt)
    tokens = [*sequence.tokens, *item.drafts] if item.drafts else sequence.tokens
    return SampleRow(
        params=request.sampling,
        seed=request.seed,
        position=end,
        prompt=TokenWindow(tokens, 0, prompt),
        output=TokenWindow(tokens, prompt, end),
        bad_tokens=request.bad_tokens,
    )


class _EditTable:
    """Logit edits of the rows, in the operation's order: row by row, kind by kind."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self.errors: dict[int, RowError] = {}
        self._begin = [0]
        self._tokens: list[Ints] = []
        self._values: list[Floats] = []

    def add_row(self, row: SampleRow | None) -> None:
        """Append the edits of the next row; None: it has none."""
        if row is None:
            self._begin += self._begin[-1:] * len(EDITS)
            return
        params, output = row.params, row.output
        self._add(self._bias(params.logit_bias))
        stops = params.stop_token_ids if len(output) < params.min_tokens else ()
        suppressed = {*stops, *completing(row.bad_tokens, output)}
        self._add({i: _NEVER for i in suppressed if 0 <= i < self._vocabulary_size})
        penalty = params.repetition_penalty
        self._add(dict.fromkeys({*row.prompt, *output}, penalty) if penalty != 1.0 else {})
        self._add(_counted(output, params.frequency_penalty, params.presence_penalty))

    def edits(self) -> Edits | None:
        """The table on the host; None if no logit changes."""
        if not self._tokens:
            return None
        parts = (
            np.array(self._begin, dtype=np.int32),
            np.concatenate(self._tokens),
            np.concatenate(self._values),
        )
        return Edits(*map(torch.from_numpy, parts))

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


def completing(runs: Sequence[Sequence[int]], output: Sequence[int]) -> Iterator[int]:
    """The tokens that would complete one of the runs behind this output."""
    for run in runs:
        before = len(run) - 1
        ended = output[len(output) - before :] if before <= len(output) else None
        if ended is not None and list(ended) == list(run[:-1]):
            yield run[-1]


def _counted(output: Sequence[int], frequency: float, presence: float) -> dict[int, float]:
    """Frequency and presence penalty of each token in the output."""
    if frequency == 0.0 and presence == 0.0:
        return {}
    return {token: frequency * n + presence for token, n in Counter(output).items()}


class TokenWindow(Sequence[int]):
    """values[begin:end] without a copy of a long prompt; `values` may only grow at its end."""

    __slots__ = ("_begin", "_end", "_values")

    def __init__(self, values: list[int], begin: int, end: int) -> None:
        self._values, self._begin, self._end = values, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(self._begin, self._end)
        if isinstance(index, slice):
            return [self._values[at] for at in places[index]]
        return self._values[places[index]]

    def __iter__(self) -> Iterator[int]:
        return islice(self._values, self._begin, self._end)
