"""An engine in this process, for batches of requests: token ids in, token ids out.

`LLM` adds text to it; training generates a model's own outputs with it, evaluation its answers and
timings. Knows nothing of text, adapter names or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
from torch import Tensor

from quickchange_server.adapters.manager import PacedLoad
from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.errors import (
    AdapterFailedError,
    AdapterWeightsError,
    EngineFailedError,
    QuickchangeError,
    RequestFailedError,
    SettingError,
)
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.protocol import (
    AdapterFailed,
    AdapterMoved,
    Delta,
    FinishReason,
    StepStats,
    Submit,
    TokenLogprobs,
)
from quickchange_server.spec_decode.prompt_lookup import TokenText
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store

LoadAdapter = Callable[[str], CanonicalAdapter]
Ends = Callable[[Delta], bool]


@dataclass(frozen=True, slots=True)
class EngineCompletion:
    """The result of one request. Times in seconds since its submission."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    first_token_seconds: float
    seconds: float  # to its last token
    drafted: int  # draft tokens verified
    accepted: int  # tokens that came from accepted drafts
    cached_tokens: int  # prompt tokens found in the prefix cache
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, if requested
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # one per prompt token after the first
    embedding: bytes | None = None  # float32 little-endian [H], if requested
    states: Tensor | None = None  # [tokens, H], if requested: see `InProcessEngine.run`


@dataclass(frozen=True, slots=True)
class DepthCount:
    """Draft counts of one drafter at one depth, over a whole run."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class EngineRun:
    """All completions in the requests' order, with the run's time and draft counts."""

    completions: tuple[EngineCompletion, ...]
    seconds: float
    steps: int
    drafts: Mapping[tuple[str, int], DepthCount]  # by (drafter, depth from 1), as in DraftCount

    @property
    def tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests over the run's wall-clock time."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Pending:
    """A submitted request that has not ended."""

    index: int  # position in the list of requests
    submitted: float  # seconds, monotonic
    deltas: list[Delta] = field(default_factory=list)
    first: float = 0.0
    states: list[Tensor] = field(default_factory=list)  # [H] each

    def add(self, delta: Delta) -> None:
        if delta.token_ids and not self.first:
            self.first = time.monotonic() - self.submitted
        self.deltas.append(delta)

    def completion(self, reason: FinishReason) -> EngineCompletion:
        deltas = self.deltas
        return EngineCompletion(
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=reason,
            first_token_seconds=self.first,
            seconds=time.monotonic() - self.submitted,
            drafted=sum(delta.drafted for delta in deltas),
            accepted=sum(delta.accepted for delta in deltas),
            cached_tokens=sum(delta.cached_tokens or 0 for delta in deltas),
            logprobs=tuple(scores for delta in deltas for scores in delta.logprobs),
            prompt_logprobs=tuple(scores for delta in deltas for scores in delta.prompt_logprobs),
            embedding=deltas[-1].embedding,
            states=torch.stack(self.states) if self.states else None,
        )


class _StateTap:
    """Keeps what enters the LM head: one row per token that a step samples, in order."""

    def __init__(self, engine: Engine) -> None:
        self._rows: Tensor | None = None
        self._engine = engine
        engine.watch_states(self._keep)

    def _keep(self, rows: Tensor) -> None:
        self._rows = rows

    def take(self) -> Tensor:
        """The last step's rows [tokens, H], on the CPU."""
        rows, self._rows = self._rows, None
        if rows is None:
            raise RuntimeError("a step sampled tokens and gave no hidden states")
        return rows.to("cpu", copy=True)

    def __enter__(self) -> _StateTap:
        return self

    def __exit__(self, *_error: object) -> None:
        self._engine.watch_states(None)


def _paced(load: LoadAdapter) -> PacedLoad:
    return lambda digest, _pause: load(digest)


class InProcessEngine:
    """Engine that answers lists of requests. A context manager: closing ends its loader thread.

    `load_adapter` reads an adapter version by its digest; by default from `settings.store`.
    `text`: the tokenizer, where drafts may be words of the prompt, as a server's are.
    `settings.threads`, where given, becomes this process's number of torch threads. Raises what
    `load_model` raises.
    """

    def __init__(
        self,
        settings: Settings,
        load_adapter: LoadAdapter | None = None,
        text: TokenText | None = None,
    ) -> None:
        if settings.tensor_parallel > 1:
            raise SettingError(
                "tensor_parallel: an engine in this process holds the whole model; use 1 here, or "
                "the server",
                param="tensor_parallel",
            )
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._awake = threading.Event()
        self._closed = False
        started = time.monotonic()
        model = load_model(
            settings.model,
            dtype=settings.dtype,
            device=torch.device(settings.device),
            adapters=settings.adapters,
            quantization=settings.quantization,
            deterministic=settings.deterministic,
            extra_vocabulary=settings.spare_tokens,
            model_check=settings.model_check,
        )
        self.device_bytes: dict[str, int] = {}  # memory of each adapter loaded, by digest
        self._engine = Engine(
            model,
            settings,
            load_adapter=_paced(load_adapter)
            if load_adapter
            else Store(*settings.store_opening).load,
            on_wake=self._awake.set,
            text=text,
        )
        self.info = self._engine.ready(time.monotonic() - started)

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.close()

    def run(
        self,
        requests: Sequence[Submit],
        *,
        concurrency: int | None = None,
        states: bool = False,
        ends: Ends | None = None,
        on_finished: Callable[[int, EngineCompletion], None] | None = None,
    ) -> EngineRun:
        """Answer all requests; `on_finished` is called with each (index, completion) as it ends.

        `concurrency`: requests in the engine at once, None: all (the settings' `max_sequences`
        still bounds a step). `states`: keep the hidden state that entered the LM head for each
        token, in the model's dtype; for requests without drafting only. `ends` is called with every
        delta and returns true if its request is complete there, as at a stop string.

        Raises AdapterFailedError, RequestFailedError or EngineFailedError, naming the request, at
        the first that can't be answered, and the rest is cancelled; ValueError for ids that are not
        distinct and for states with drafting; RuntimeError after `close`.
        """
        self._check(requests, states)
        steps, counts = 0, _DraftTally()
        completions: dict[int, EngineCompletion] = {}
        waiting = iter(enumerate(requests))
        pending: dict[str, _Pending] = {}
        started = time.monotonic()
        try:
            with self._tap(states) as tap:
                self._submit(waiting, pending, concurrency or len(requests))
                while pending:
                    stats, ended = self._step(pending, tap, ends)
                    steps += stats is not None
                    counts.add(stats)
                    for index, completion in ended:
                        completions[index] = completion
                        if on_finished is not None:
                            on_finished(index, completion)
                    self._submit(waiting, pending, len(ended))
        finally:
            for request_id in pending:
                self._engine.cancel(request_id)
        return EngineRun(
            completions=tuple(completions[i] for i in range(len(requests))),
            seconds=time.monotonic() - started,
            steps=steps,
            drafts=counts.by_depth(),
        )

    def prompt_states(self, request: Submit) -> Tensor:
        """The states [tokens - 1, H] that entered the LM head for the prompt's tokens from the
        second on, in the model's dtype; nothing is generated.

        Raises what `run` raises.
        """
        self._check((request,), False)
        sampling = replace(request.sampling, max_tokens=0, prompt_logprobs=0)
        parts: list[Tensor] = []
        with _StateTap(self._engine) as tap:
            self._engine.submit(replace(request, sampling=sampling, drafting=None))
            while True:
                self._awake.clear()
                failed = _failures(self._engine.poll_adapters())
                report = self._engine.step()
                if report is None:
                    self._awake.wait()
                    continue
                for delta in report.deltas:
                    if delta.finish_reason == "error":
                        raise _error_of(delta, failed)
                parts.append(tap.take())
                if any(delta.finish_reason is not None for delta in report.deltas):
                    return torch.cat(parts)

    def _check(self, requests: Sequence[Submit], states: bool) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed; make another")
        if len({request.request_id for request in requests}) < len(requests):
            raise ValueError("request_id: two requests have one; give each its own")
        if states and any(request.drafting is not None for request in requests):
            raise ValueError("states are kept only of requests whose drafting is None")

    def _tap(self, states: bool) -> AbstractContextManager[_StateTap | None]:
        return _StateTap(self._engine) if states else nullcontext()

    def _submit(
        self,
        waiting: Iterator[tuple[int, Submit]],
        pending: dict[str, _Pending],
        count: int,
    ) -> None:
        """Submit the next `count` requests to the engine."""
        for _ in range(count):
            index, request = next(waiting, (0, None))
            if request is None:
                return
            pending[request.request_id] = _Pending(index, time.monotonic())
            self._engine.submit(request)

    def _step(
        self, pending: dict[str, _Pending], tap: _StateTap | None, ends: Ends | None
    ) -> tuple[StepStats | None, list[tuple[int, EngineCompletion]]]:
        """Run one step; returns what ended in it."""
        self._awake.clear()
        moves = self._engine.poll_adapters()
        failed = _failures(moves)
        self.device_bytes.update(
            {m.digest: m.bytes for m in moves if isinstance(m, AdapterMoved) and m.tier == "device"}
        )
        report = self._engine.step()
        if report is None:
            self._awake.wait()  # nothing can run before an adapter is loaded
            return None, []
        sampled = [delta for delta in report.deltas if delta.token_ids]
        if tap is not None and sampled:
            for delta, state in zip(sampled, tap.take(), strict=True):
                pending[delta.request_id].states.append(state)
        ended = []
        for delta in report.deltas:
            request = pending.get(delta.request_id)
            if request is None:  # already completed by an earlier delta of this step
                continue
            reason = self._take(delta, request, ends, failed)
            if reason is not None:
                del pending[delta.request_id]
                ended.append((request.index, request.completion(reason)))
        return report.stats, ended

    def _take(
        self, delta: Delta, request: _Pending, ends: Ends | None, failed: str
    ) -> FinishReason | None:
        """Add a delta to its request; returns the finish reason, if it is complete."""
        if delta.finish_reason == "error":
            raise _error_of(delta, failed)
        request.add(delta)
        complete = ends is not None and ends(delta)
        if complete and delta.finish_reason is None:
            self._engine.cancel(delta.request_id)
            return "stop"
        return delta.finish_reason


def _error_of(delta: Delta, failed: str) -> QuickchangeError:
    message = f"request {delta.request_id}: {delta.error or failed}"
    match delta.error_kind:
        case "adapter":
            return AdapterFailedError(message)
        case "request":
            return RequestFailedError(message)
        case "weights":
            return AdapterWeightsError(message, param="adapters")
        case _:
            return EngineFailedError(message)


class _DraftTally:
    """Sum of draft counts over steps."""

    def __init__(self) -> None:
        self._drafted: Counter[tuple[str, int]] = Counter()
        self._accepted: Counter[tuple[str, int]] = Counter()

    def add(self, stats: StepStats | None) -> None:
        for count in () if stats is None else stats.drafts:
            self._drafted[count.drafter, count.depth] += count.drafted
            self._accepted[count.drafter, count.depth] += count.accepted

    def by_depth(self) -> dict[tuple[str, int], DepthCount]:
        return {
            key: DepthCount(drafted, self._accepted[key])
            for key, drafted in sorted(self._drafted.items())
        }


def _failures(moves: Iterable[AdapterMoved | AdapterFailed]) -> str:
    """Errors of adapters that failed to load, in one line."""
    return "; ".join(f"{m.digest}: {m.error}" for m in moves if isinstance(m, AdapterFailed))
