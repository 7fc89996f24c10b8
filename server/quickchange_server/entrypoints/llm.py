"""An engine in this process, for many requests at once and no server: token ids in and out.

Training makes a model's own outputs with it and evaluation its answers and timings; neither needs
HTTP, a second process or text.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine, torch_dtype
from quickchange_server.model.model_loader import load_model
from quickchange_server.model.paged_attention import UnsupportedModelError
from quickchange_server.protocol import (
    AdapterFailed,
    AdapterMoved,
    Component,
    Delta,
    Drafting,
    FinishReason,
    SamplingParams,
    StepStats,
    Submit,
)
from quickchange_server.spec_decode.phrase_lookup import TokenText
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.store import Store
from quickchange_training.errors import ModelError
from quickchange_training.turbo.head_maker import Wanted
from quickchange_training.turbo.turbo_data import Generate, OnOutput

_TOGETHER = 48  # sequences of a step that makes outputs
_THE_ADAPTER = "adapter"  # stands for the digest of the only one

LoadAdapter = Callable[[str], CanonicalAdapter]


class OfflineError(RuntimeError):
    """A request could not be answered; the message names it by its index and says why."""


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """One prompt, as `Submit` has it; its index in the list of requests names it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[Component, ...] = ()  # empty: the plain base model
    drafting: Drafting | None = None  # None: no token is drafted


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request came to. Times in seconds since it was submitted."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    first_token_seconds: float
    seconds: float  # to its last token
    drafted: int  # draft tokens verified for it
    accepted: int  # of its tokens, those that came from accepted drafts
    states: Tensor | None = None  # [tokens, H] where they were asked for: see `OfflineEngine.run`


@dataclass(frozen=True, slots=True)
class DepthCount:
    """Drafts at one depth of one drafter, over a whole run."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """All completions, in the requests' order, and what the run took."""

    completions: tuple[Completion, ...]
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
    """A request on its way."""

    submitted: float  # seconds, monotonic
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    drafted: int = 0
    accepted: int = 0
    states: list[Tensor] = field(default_factory=list)  # [H] each

    def add(self, delta: Delta) -> None:
        if delta.token_ids and not self.tokens:
            self.first = time.monotonic() - self.submitted
        self.tokens += delta.token_ids
        self.drafted += delta.drafted
        self.accepted += delta.accepted

    def completion(self, reason: FinishReason) -> Completion:
        return Completion(
            token_ids=tuple(self.tokens),
            finish_reason=reason,
            first_token_seconds=self.first,
            seconds=time.monotonic() - self.submitted,
            drafted=self.drafted,
            accepted=self.accepted,
            states=torch.stack(self.states) if self.states else None,
        )


class _StateTap:
    """Sees what enters the LM head: one row for each token that a step samples, in its order."""

    def __init__(self, head: torch.nn.Module) -> None:
        self._rows: Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._keep)

    def _keep(self, _head: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._rows = args[0].reshape(-1, args[0].shape[-1])

    def take(self) -> Tensor:
        """The last step's rows [tokens, H], on the CPU."""
        rows, self._rows = self._rows, None
        if rows is None:
            raise RuntimeError("a step sampled tokens without calling the LM head")
        return rows.to("cpu", copy=True)

    def close(self) -> None:
        self._handle.remove()


class OfflineEngine:
    """Answers lists of requests. A context manager: closing ends its loader thread.

    `load_adapter` reads an adapter version by its digest; by default from `settings.store`.
    `settings.threads`, where given, becomes this process's number of torch threads. Raises what
    `load_model` raises.
    """

    def __init__(
        self,
        settings: Settings,
        load_adapter: LoadAdapter | None = None,
        text: TokenText | None = None,
    ) -> None:
        """text: the tokenizer, where drafts may be words of the prompt, as a server's are."""
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._awake = threading.Event()
        model = load_model(
            settings.model,
            dtype=torch_dtype(settings.dtype),
            device=torch.device(settings.device),
            adapters=settings.adapters,
            quantization=settings.quantization,
        )
        self._head = model.module.get_output_embeddings()  # type: ignore[operator]
        self._engine = Engine(
            model,
            settings,
            load_adapter=load_adapter or Store(settings.store).load,
            on_wake=self._awake.set,
            text=text,
        )

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._engine.close()

    def run(
        self,
        requests: Sequence[OfflineRequest],
        *,
        concurrency: int | None = None,
        states: bool = False,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> OfflineRun:
        """Answer all requests; `on_finished` hears of each (index, completion) as it ends.

        `concurrency`: requests in the engine at once, None: all (the settings' `max_sequences`
        still bounds a step). `states`: keep the hidden state that entered the LM head for each
        token, in the model's dtype; for requests without drafting only. Raises OfflineError at the
        first request that can't be answered, ValueError for states with drafting.
        """
        if states and any(request.drafting is not None for request in requests):
            raise ValueError("states are kept only of requests whose drafting is None")
        steps, counts = 0, _DraftTally()
        completions: dict[int, Completion] = {}
        waiting = iter(enumerate(requests))
        pending: dict[str, _Pending] = {}
        started = time.monotonic()
        tap = _StateTap(self._head) if states else None
        try:
            self._submit(waiting, pending, concurrency or len(requests))
            while pending:
                stats, ended = self._step(pending, tap)
                steps += stats is not None
                counts.add(stats)
                for index, completion in ended:
                    completions[index] = completion
                    if on_finished is not None:
                        on_finished(index, completion)
                self._submit(waiting, pending, len(ended))
        finally:
            if tap is not None:
                tap.close()
            for request_id in pending:
                self._engine.cancel(request_id)
        return OfflineRun(
            completions=tuple(completions[i] for i in range(len(requests))),
            seconds=time.monotonic() - started,
            steps=steps,
            drafts=counts.by_depth(),
        )

    def _submit(
        self,
        waiting: Iterator[tuple[int, OfflineRequest]],
        pending: dict[str, _Pending],
        count: int,
    ) -> None:
        """Hand the next `count` requests to the engine."""
        for _ in range(count):
            index, request = next(waiting, (0, None))
            if request is None:
                return
            pending[str(index)] = _Pending(time.monotonic())
            self._engine.submit(
                Submit(
                    str(index),
                    request.prompt,
                    request.sampling,
                    adapters=request.adapters,
                    drafting=request.drafting,
                )
            )

    def _step(
        self, pending: dict[str, _Pending], tap: _StateTap | None
    ) -> tuple[StepStats | None, list[tuple[int, Completion]]]:
        """One step; what ended in it."""
        self._awake.clear()
        failed = _failures(self._engine.poll_adapters())
        report = self._engine.step()
        if report is None:
            self._awake.wait()  # nothing can run until an adapter has been read
            return None, []
        sampled = [delta for delta in report.deltas if delta.token_ids]
        if tap is not None and sampled:
            for delta, state in zip(sampled, tap.take(), strict=True):
                pending[delta.request_id].states.append(state)
        ended = []
        for delta in report.deltas:
            request = pending[delta.request_id]
            request.add(delta)
            if delta.finish_reason == "error":
                why = delta.error or failed
                raise OfflineError(f"request {delta.request_id}: {why}")
            if delta.finish_reason is not None:
                del pending[delta.request_id]
                ended.append((int(delta.request_id), request.completion(delta.finish_reason)))
        return report.stats, ended


class _DraftTally:
    """Sums draft counts over steps."""

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
    """What went wrong with adapters, in one line."""
    return "; ".join(f"{m.digest}: {m.error}" for m in moves if isinstance(m, AdapterFailed))


def generate_for(wanted: Wanted) -> Generate:
    """A maker of greedy outputs for the training of heads: an engine that ends with the run.

    What it makes raises ModelError where the model can't be served or a prompt can't be answered.
    """

    def generate(prompts: Sequence[Sequence[int]], on_output: OnOutput) -> None:
        settings = Settings(
            model=wanted.model,
            store=Path(os.devnull),  # the only adapter is at hand
            dtype=wanted.dtype,
            max_sequences=_TOGETHER,
            adapters=wanted.adapter is not None,
        )
        sampling = SamplingParams(
            seed=0,
            max_tokens=wanted.max_new_tokens,
            temperature=0.0,
            stop_token_ids=wanted.stop_token_ids,
        )
        adapters = () if wanted.adapter is None else (Component(_THE_ADAPTER),)
        requests = [OfflineRequest(tuple(prompt), sampling, adapters) for prompt in prompts]

        def finished(index: int, completion: Completion) -> None:
            if completion.states is None:
                raise OfflineError(f"request {index}: it ended without a token")
            on_output(index, completion.token_ids, completion.states)

        try:
            with OfflineEngine(settings, lambda _digest: _known(wanted.adapter)) as engine:
                engine.run(requests, states=True, on_finished=finished)
        except (OfflineError, UnsupportedModelError) as error:
            raise ModelError(f"{wanted.model}: its outputs can't be made: {error}") from error

    return generate


def _known(adapter: CanonicalAdapter | None) -> CanonicalAdapter:
    if adapter is None:
        raise OfflineError("an adapter was asked for, but the outputs are the base's own")
    return adapter
